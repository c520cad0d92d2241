/* Windows in which a number comes to mean something else, and deaths between two stores that belong together.
 *
 *   windows PATH [scenario]
 *
 * Somebody has found a chunk, a client or a pool by its number and is stopped; meanwhile the number is given back and
 * used again. Or a thread dies half way through a change of the tables, or whoever repairs it does. */
#include "scenarios.h"
#include "sizes.h"

#include <sys/syscall.h>

enum {
    LOOK = 97, /* an actor looks at the clock, as it does first of all in a grace period; see clock_gettime */
    DONE = 98, /* it has done its operation, and its thread has not ended yet */
    GATE = 99  /* it is registered as a thread, and has done nothing else */
};

/* For the core this is libc's. An actor that was told to stop when it looks at the clock has looked before it stops,
 * and from then on finds ten seconds gone at every look: no grace period waits for it any longer. */
int clock_gettime(clockid_t id, struct timespec *now)
{
    static time_t late;
    int rc = (int)syscall(SYS_clock_gettime, id, now);
    now->tv_sec += late;
    if (self && atomic_load(&self->point) == LOOK) {
        kill_point(LOOK);
        late += atomic_load(&self->reached) ? 10 : 0;
    }
    return rc;
}

/* In an actor: be ready to stop again, at `point`. */
static void arm(struct actor *a, uint32_t point)
{
    atomic_store(&a->point, point);
    atomic_store(&a->reached, 0);
    atomic_store(&a->go, 0);
}

/* Let an actor go on from one point to the next for which it is armed. */
static void go_to_next(int i)
{
    atomic_store(&actors[i].go, 1);
    for (int tries = 0; tries < 25000 && atomic_load(&actors[i].go); tries++)
        nap();
    at_point(i);
}

static int64_t get_one(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 1, a->page, 1); }

/* ---- A chunk's number ------------------------------------------------------------------------------------- */

static int64_t evict_one(struct world *w, struct actor *a)
{
    (void)a;
    return (int64_t)tm_evict(ctx_get(w->seg), -1, 1, false);
}

static int64_t compact_one(struct world *w, struct actor *a)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    (void)a;
    op_begin(ctx);
    bool freed = compact(ctx);
    op_end(ctx);
    return freed;
}

/* The bin of the chunk that somebody means to empty; TM_NBINS if nobody means to, or the chunk is not in use. */
static uint32_t bin_to_empty(struct tm_segment *seg)
{
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++) {
        uint32_t c = atomic_load(&seg->threads[i].drain);
        if (c && atomic_load(&seg->states[c - 1]) == CHUNK_USED)
            return seg->chunks[c - 1].bin;
    }
    return TM_NBINS;
}

/* The evictor has taken a chunk of ephemeral pages from its queue and does not own it yet; those pages are flushed and
 * the chunk is used for persistent ones. They must not be evicted. */
static void evict_and_reuse(struct world *w)
{
    for (uint32_t i = 0; i < RAW_PER_CHUNK; i++) {
        put_sized(&w->ephemeral, i, RAW);
        put_sized(&w->pool, 200 + i, RAW); /* this chunk is full: the next page needs another */
    }
    pid_t evictor = start(0, evict_one, 52, 0);
    at_point(0);
    tm_flush(&w->ephemeral, oid, 0, RAW_PER_CHUNK);
    for (uint32_t i = 0; i < 10; i++)
        put_sized(&w->pool, 100 + i, RAW);
    expect(bin_to_empty(w->seg) < BIN_OBJECT, "the scenario did not come about");
    finish(0, evictor);
    for (uint32_t i = 0; i < 10; i++)
        expect(holds_sized(&w->pool, 100 + i, RAW), "persistent page %u is lost", i);
    check(w);
}

/* The other way round: a chunk of persistent pages is to be emptied by moving them, and becomes one of ephemeral pages,
 * which must neither be moved nor lose their frequencies (they have none to give away). */
static void compact_and_reuse(struct world *w)
{
    for (uint32_t i = 0; i < 3 * RAW_PER_CHUNK; i++)
        put_sized(&w->pool, i, RAW);
    tm_flush(&w->pool, oid, 1, RAW_PER_CHUNK - 1); /* one page stays in the first chunk, three in the others */
    tm_flush(&w->pool, oid, RAW_PER_CHUNK + 3, RAW_PER_CHUNK - 3);
    tm_flush(&w->pool, oid, 2 * RAW_PER_CHUNK + 3, RAW_PER_CHUNK - 3);
    put_sized(&w->ephemeral, 0, 0); /* its index exists, and takes no chunk any more */
    pid_t mover = start(0, compact_one, 52, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 0, 1);
    for (uint32_t i = 0; i < RAW_PER_CHUNK; i++)
        put_sized(&w->ephemeral, i, RAW);
    expect(bin_is_ephemeral(bin_to_empty(w->seg)), "the scenario did not come about");
    finish(0, mover);
    expect(actors[0].result == 0, "a chunk of ephemeral pages was emptied by compaction");
    for (uint32_t i = 0; i < RAW_PER_CHUNK; i++)
        expect(holds_sized(&w->ephemeral, i, RAW), "ephemeral page %u is lost", i);
    for (uint32_t i = 0; i < 3; i++)
        expect(holds_sized(&w->pool, RAW_PER_CHUNK + i, RAW), "persistent page %u is lost", RAW_PER_CHUNK + i);
    check(w);
}

/* ---- A client's number ------------------------------------------------------------------------------------ */

static int64_t freeze_victim(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    (void)a;
    client_open(ctx_get(w->seg), "victim", false, &id, &serial);
    return client_set_mode(ctx_get(w->seg), id, serial, MODE_FROZEN);
}

static int64_t depart_victim(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    client_open(ctx, "victim", false, &id, &serial);
    client_handoff(ctx, id, serial, PHASE_COPYING);
    client_handoff(ctx, id, serial, PHASE_FROZEN);
    arm(a, LOOK);
    int rc = client_handoff(ctx, id, serial, PHASE_DEPARTED);
    arm(a, DONE);
    kill_point(DONE);
    return rc;
}

/* Destroy client `id` and open another one, which gets its number. */
static uint32_t replace_victim(struct world *w, uint32_t id, uint32_t serial)
{
    uint32_t next = TM_MAX_CLIENTS, next_serial = 0;
    client_destroy(ctx_get(w->seg), id, serial);
    client_open(ctx_get(w->seg), "successor", true, &next, &next_serial);
    expect(next == id, "the scenario did not come about");
    return next_serial;
}

/* A client that is off is to be frozen; during the grace period it is destroyed, and another client gets its number.
 * That one must not be frozen. */
static void mode_and_destroy(struct world *w)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t id, serial;
    client_open(ctx, "victim", true, &id, &serial);
    client_set_mode(ctx, id, serial, MODE_OFF);
    pid_t setter = start(0, freeze_victim, LOOK, 0);
    at_point(0);
    replace_victim(w, id, serial);
    finish(0, setter);
    expect(actors[0].result == TM_NOPOOL, "freezing a destroyed client says %lld", (long long)actors[0].result);
    expect(atomic_load(&w->seg->clients[id].mode) == MODE_ON, "the mode of another client was set");
    check(w);
}

/* The last step of a handoff fails because a reader does not get on, and is taken back; meanwhile another client has
 * the number. That one is in no handoff, and must not be put into one that nobody would ever end. */
static void phase_and_destroy(struct world *w)
{
    struct tm_handle next = {.seg = w->seg};
    struct pool_wish wish = {.persistent = true, .id = -1};
    uint32_t id, serial;
    put(&w->pool, 1, 1);
    client_open(ctx_get(w->seg), "victim", true, &id, &serial);
    pid_t copier = start(0, depart_victim, 0, 0);
    at_point(0);
    pid_t reader = start(1, get_one, 46, 0);
    at_point(1);
    uint32_t next_serial = replace_victim(w, id, serial);
    pool_new(ctx_get(w->seg), id, next_serial, &wish, &next.pool, &next.serial);
    go_to_next(0); /* when the thread ends, a handoff would end with it */
    expect(phase_of(w->seg, id) == PHASE_NONE, "the other client is in phase %u", phase_of(w->seg, id));
    expect(put(&next, 1, 1) == 1 && holds(&next, 1, 1), "the other client's put is refused");
    finish(0, copier);
    expect(actors[0].result == TM_BUSY, "departing beside a stopped reader says %lld", (long long)actors[0].result);
    finish(1, reader);
    check(w);
}

/* ---- A pool's number -------------------------------------------------------------------------------------- */

static int64_t destroy_ephemeral(struct world *w, struct actor *a)
{
    (void)a;
    return pool_destroy(ctx_get(w->seg), w->ephemeral.pool, w->ephemeral.serial);
}

static int64_t reap(struct world *w, struct actor *a)
{
    (void)a;
    return tm_reap(ctx_get(w->seg));
}

static bool in_operation(struct tm_segment *seg, pid_t pid)
{
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++)
        if (seg->threads[i].pid == (uint32_t)pid && atomic_load(&seg->threads[i].op) & 1)
            return true;
    return false;
}

/* Two finish the same dying pool. The second finds nothing left to do while an eviction, which began after its grace
 * period, has not counted its page yet: the pool's number must not be free before, or the next pool would count it. */
static void sweep_and_evict(struct world *w)
{
    _Atomic uint32_t *state = &w->seg->pools[w->ephemeral.pool].state;
    put_sized(&w->ephemeral, 1, RAW);
    pid_t destroyer = start(0, destroy_ephemeral, 26, 0);
    at_point(0); /* at the pool's only object */
    pid_t reaper = start(1, reap, LOOK, 1);
    at_point(1); /* in its grace period: it waits for the destroyer's operation, and will not wait for later ones */
    pid_t evictor = start(2, evict_one, 41, 0);
    at_point(2);
    atomic_store(&actors[0].go, 1);
    for (int i = 0; i < 25000 && in_operation(w->seg, destroyer); i++)
        nap();
    finish(1, reaper);
    expect(atomic_load(state) == DYING, "the pool's number is free while an eviction is under way");
    finish(2, evictor);
    finish(0, destroyer);
    expect(atomic_load(state) == FREE, "the pool's number is in state %u", atomic_load(state));
    check(w);
}

/* ---- Deaths between two stores ---------------------------------------------------------------------------- */

static int64_t commit_two(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    (void)a;
    client_stage(ctx, "one", &id, &serial);
    client_stage(ctx, "two", &id, &serial);
    return client_commit(ctx);
}

static int64_t stage_one(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    (void)a;
    int rc = client_stage(ctx_get(w->seg), "half filled", &id, &serial);
    kill_point(DONE);
    return rc;
}

/* Somebody dies when it has shown the first of two staged clients: all are shown, and before anybody can see that one
 * is not, or make another client of its name. */
static void dead_committer(struct world *w)
{
    uint32_t id, serial, named = 0;
    struct tm_ctx *ctx = ctx_get(w->seg);
    pid_t committer = start(0, commit_two, 63, 0);
    at_point(0);
    die(committer);
    expect(client_open(ctx, "one", false, &id, &serial) == TM_OK, "the first staged client is not shown");
    expect(client_open(ctx, "two", false, &id, &serial) == TM_OK, "the second staged client is not shown");
    client_open(ctx, "two", true, &id, &serial); /* as any front end does */
    tm_reap(ctx);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        named += atomic_load(&w->seg->clients[i].state) == LIVE && !strcmp(w->seg->clients[i].name, "two");
    expect(named == 1, "%u clients are called two", named);
    check(w);
}

/* Somebody dies when it has shown all, before it has noted that; what it showed is destroyed, and the numbers are used
 * again. Its note must not show what the next owner of its thread record has staged and dies over. */
static void stale_commit(struct world *w)
{
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    pid_t committer = start(0, commit_two, 63, 1);
    at_point(0);
    die(committer);
    for (int i = 0; i < 2; i++) {
        expect(client_open(ctx, i ? "two" : "one", false, &id, &serial) == TM_OK, "a staged client is not shown");
        client_destroy(ctx, id, serial);
    }
    client_open(ctx, "three", true, &id, &serial);
    client_open(ctx, "four", true, &id, &serial);
    tm_reap(ctx);
    pid_t stager = start(0, stage_one, DONE, 0);
    at_point(0);
    die(stager);
    tm_reap(ctx);
    expect(client_open(ctx, "half filled", false, &id, &serial) == TM_MISS, "a client is shown that nobody committed");
    check(w);
}

static struct tm_handle shared_pool; /* of the client "test" */

static int64_t leave_shared(struct world *w, struct actor *a)
{
    (void)a;
    return pool_destroy(ctx_get(w->seg), shared_pool.pool, shared_pool.serial);
}

/* Who owns a shared pool dies when it has left, before another member owns it: the next holder of the lock sees to that. */
static void dead_owner(struct world *w)
{
    static const uint8_t uuid[TM_UUID] = {1, 2, 3};
    struct tm_ctx *ctx = ctx_get(w->seg);
    struct pool_wish wish = {.uuid = uuid, .id = -1};
    struct tm_handle kept = {.seg = w->seg};
    uint32_t id, serial;
    client_open(ctx, "test", false, &id, &serial);
    client_authorise(ctx, id, serial, uuid);
    expect(pool_new(ctx, id, serial, &wish, &shared_pool.pool, &shared_pool.serial) == TM_OK, "no shared pool");
    client_open(ctx, "other", true, &id, &serial);
    client_authorise(ctx, id, serial, uuid);
    expect(pool_new(ctx, id, serial, &wish, &kept.pool, &kept.serial) == TM_OK, "no member");
    expect(put(&kept, 1, 1) == 1 && holds(&kept, 1, 1), "it does not keep a page");
    pid_t leaver = start(0, leave_shared, 61, 0);
    at_point(0);
    die(leaver);
    check(w);
    uint32_t owner = atomic_load(&w->seg->pools[w->seg->pools[kept.pool].link].owner);
    expect(owner == id, "client %u owns the pool, not %u", owner, id);
    expect(holds(&kept, 1, 1), "the page is lost");
}

static int64_t begin_and_end_handoff(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    (void)a;
    client_open(ctx, "test", false, &id, &serial);
    client_handoff(ctx, id, serial, PHASE_COPYING);
    client_handoff(ctx, id, serial, PHASE_FROZEN);
    return client_handoff(ctx, id, serial, PHASE_NONE);
}

/* A copier dies between the two stores of any step of a handoff: it is over, and puts are taken again. */
static void dead_copier(struct world *w)
{
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS;
    for (uint32_t step = 0; step < 3; step++) {
        pid_t copier = start(0, begin_and_end_handoff, 90, step);
        at_point(0);
        die(copier);
        tm_reap(ctx_get(w->seg));
        expect(phase_of(w->seg, client) == PHASE_NONE && !atomic_load(&w->seg->clients[client].copier),
               "step %u: nobody hands the client over, and it is in phase %u", step, phase_of(w->seg, client));
        expect(put(&w->pool, 1, step + 1) == 1, "step %u: a put is refused", step);
    }
    check(w);
}

static int64_t hold(struct world *w, struct actor *a)
{
    uint32_t id, serial;
    (void)a;
    client_open(ctx_get(w->seg), "test", false, &id, &serial);
    int rc = client_hold(ctx_get(w->seg), id, serial);
    kill_point(DONE);
    return rc;
}

static int64_t reap_later(struct world *w, struct actor *a)
{
    kill_point(GATE);
    arm(a, 91);
    return tm_reap(ctx_get(w->seg));
}

/* Who held a client dies, and so does the reaper that is about to note that: the next one must. */
static void dead_releaser(struct world *w)
{
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS;
    pid_t reaper = start(1, reap_later, GATE, 0); /* registered first: else it would inherit the dead one's record */
    at_point(1);
    pid_t holder = start(0, hold, DONE, 0);
    at_point(0);
    die(holder);
    go_to_next(1);
    expect(atomic_load(&w->seg->clients[client].held) == 1, "the scenario did not come about");
    die(reaper);
    tm_reap(ctx_get(w->seg));
    expect(atomic_load(&w->seg->clients[client].held) == 2, "a client whose holders are dead is held (%u)",
           atomic_load(&w->seg->clients[client].held));
    check(w);
}

static int64_t turn_off(struct world *w, struct actor *a)
{
    (void)a;
    return segment_set_mode(ctx_get(w->seg), MODE_OFF);
}

/* Whoever turns the segment off drops what an ephemeral pool has, and is slow. It is turned on again, the pool destroyed, and its
 * number a persistent pool's. */
static void dropped_pool_used_again(struct world *w)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS, serial = atomic_load(&w->seg->clients[client].serial);
    struct tm_handle made = {.seg = w->seg};
    put(&w->ephemeral, 1, 1);
    pid_t off = start(0, turn_off, 59, 0);
    at_point(0);
    expect(segment_set_mode(ctx, MODE_ON) == TM_OK, "it cannot be turned on");
    pool_destroy(ctx, w->ephemeral.pool, w->ephemeral.serial);
    pool_new(ctx, client, serial, &(struct pool_wish){.persistent = true, .id = -1}, &made.pool, &made.serial);
    expect(made.pool == w->ephemeral.pool && put(&made, 1, 2) == 1, "the scenario did not come about");
    finish(0, off);
    expect(holds(&made, 1, 2), "a page of the persistent pool is lost");
    check(w);
}

static const struct scenario scenarios[] = {
    {"dropped_pool_used_again", dropped_pool_used_again},
    {"evict_and_reuse", evict_and_reuse},       {"compact_and_reuse", compact_and_reuse},
    {"mode_and_destroy", mode_and_destroy},     {"phase_and_destroy", phase_and_destroy},
    {"sweep_and_evict", sweep_and_evict},       {"dead_committer", dead_committer},
    {"stale_commit", stale_commit},             {"dead_copier", dead_copier},
    {"dead_releaser", dead_releaser},           {"dead_owner", dead_owner},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
