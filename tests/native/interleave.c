/* Deterministic interleavings of processes that are stopped at named points: the windows that random kills miss.
 *
 *   interleave PATH [scenario]
 *
 * An actor is a child process that runs one operation and stops where it is told; the driver lets it go on, or
 * kills it there. Every scenario ends with a check of all invariants. */
#include "scenarios.h"

static int64_t get_one(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 1, a->page, 1); }
static int64_t take_one(struct world *w, struct actor *a) { return tm_get(&w->taken, oid, 1, a->page, 1); }
static int64_t put_two(struct world *w, struct actor *a) { (void)a; return put(&w->pool, 1, 2); }
static int64_t put_three(struct world *w, struct actor *a) { (void)a; return put(&w->pool, 1, 3); }
static int64_t flush_one(struct world *w, struct actor *a) { (void)a; return tm_flush(&w->pool, oid, 1, 1); }

/* Put page 1's first version as page 2, when it is told to: a block of the same size. */
static int64_t put_twin(struct world *w, struct actor *a)
{
    uint8_t page[TM_PAGE];
    wait_first(w, a, 44);
    page_make(page, 5001, 2654435761u);
    return tm_put(&w->pool, oid, 2, page, 1, KEEP_OLD);
}
static int64_t destroy_pool(struct world *w, struct actor *a)
{
    (void)a;
    return pool_destroy(ctx_get(w->seg), w->pool.pool, w->pool.serial);
}
static int64_t reap_empty(struct world *w, struct actor *a)
{
    (void)a;
    return object_reap_empty(ctx_get(w->seg), 100);
}

/* A reader is stopped after it verified a block and before it decodes it; the block is replaced and used again for
 * another page. The reader must return a whole page, old or new. */
static void reader_and_reuse(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t reader = start(0, get_one, 46, 0);
    at_point(0);
    put(&w->pool, 1, 4);
    for (uint32_t i = 10; i < 200; i++) /* somewhere in here the old block is used again */
        put(&w->pool, i, 1);
    finish(0, reader);
    expect(actors[0].result == 1, "the reader got %lld", (long long)actors[0].result);
    expect(is(actors[0].page, 1, 1) || is(actors[0].page, 1, 4),
           "the reader got a page that never was");
    check(w);
}

/* C means to replace block B and dies before its swap. A has swapped B out and not freed it yet. Who repairs C must
 * leave B to A. */
static void repair_beside_living(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t c = start(1, put_three, 40, 0);
    at_point(1);
    pid_t a = start(0, put_two, 41, 0);
    at_point(0);
    die(c);
    tm_reap(ctx_get(w->seg));
    for (uint32_t i = 10; i < 60; i++) /* B must not be handed out */
        put(&w->pool, i, 1);
    finish(0, a);
    expect(holds(&w->pool, 1, 2), "the acknowledged page is lost");
    for (uint32_t i = 10; i < 60; i++)
        expect(holds(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

/* A dies inside the bin's lock after it unmarked B; B is allocated again before A is repaired. */
static void freed_and_reused(struct world *w)
{
    uint8_t page[TM_PAGE];
    put(&w->pool, 1, 1);
    put(&w->pool, 2, 2); /* its leaf exists */
    pid_t c = start(1, put_twin, 99, 0); /* registered now, so that it does not inherit A's record and repair it */
    at_point(1);
    pid_t a = start(0, flush_one, 6, 0);
    at_point(0);
    die(a);
    go_on(1); /* it took the lock over from the dead, and has B */
    uint64_t dead = 0, living = 0;
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++) {
        dead = w->seg->threads[i].old_block ? w->seg->threads[i].old_block : dead;
        living = w->seg->threads[i].new_block ? w->seg->threads[i].new_block : living;
    }
    expect(dead && dead == living, "the scenario did not come about (%llu, %llu)", (unsigned long long)dead,
           (unsigned long long)living);
    tm_reap(ctx_get(w->seg));
    for (uint32_t i = 10; i < 60; i++)
        put(&w->pool, i, 2);
    finish(1, c);
    expect(tm_get(&w->pool, oid, 2, page, 1) == 1 && is(page, 1, 1), "the page of the living is lost");
    check(w);
}

/* An exclusive get is stopped before its swap; the page is replaced. It must return the new one, and remove it. */
static void take_and_replace(struct world *w)
{
    put(&w->taken, 1, 1);
    pid_t a = start(0, take_one, 40, 0);
    at_point(0);
    put(&w->taken, 1, 2);
    finish(0, a);
    expect(actors[0].result == 1 && is(actors[0].page, 1, 2), "not the page that was there");
    expect(!holds(&w->taken, 1, 1) && !holds(&w->taken, 1, 2), "the page is still there");
    check(w);
}

/* A put has written its block when the pool begins to be destroyed; the destroyer waits for it. */
static void put_and_destroy(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, put_two, 45, 0);
    at_point(0);
    pid_t b = start(1, destroy_pool, 60, 0);
    at_point(1);
    expect(!goes_on(1), "the destroyer did not wait");
    finish(0, a);
    finish(1, b);
    expect(!holds(&w->pool, 1, 2), "the pool still answers");
    check(w);
}

/* A put to an object that was just flushed is stopped before its swap; the object is killed meanwhile. The put must
 * find out and store its page in a new one. */
static void put_and_reap(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, put_two, 45, 0);
    at_point(0);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 28, 0);
    at_point(1); /* the object is unlinked, its slots are dead; the reaper waits for the put before it frees them */
    atomic_store(&actors[1].go, 1);
    finish(0, a);
    finish(1, b);
    expect(actors[0].result == 1 && holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* A put is stopped before its swap into an empty slot; the reaper kills the slots before it, and dies. */
static void put_and_dead_reaper(struct world *w)
{
    put(&w->pool, 1, 1);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 27, 0);
    at_point(1);
    die(b);
    pid_t a = start(0, put_two, 0, 0); /* meets dead slots and must finish the dead one's work itself */
    finish(0, a);
    expect(actors[0].result == 1 && holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* The reaper meets a page in an object that it believed empty: the object lives on. */
static void reap_and_put(struct world *w)
{
    put(&w->pool, 1, 1);
    put(&w->pool, 600, 1);
    tm_flush_object(&w->pool, oid);
    pid_t b = start(1, reap_empty, 26, 0); /* condemned, no slot killed yet; the shard lock is held */
    at_point(1);
    pid_t a = start(0, put_two, 0, 0); /* needs no shard lock: the leaf is there */
    finish(0, a);
    finish(1, b);
    expect(holds(&w->pool, 1, 2), "the acknowledged page is lost");
    check(w);
}

/* A reader stopped inside a block: its chunk must not be punched, however free it is. */
static void reader_and_punch(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, get_one, 46, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 0, 4096);
    expect(tm_trim(ctx_get(w->seg), 0) == 0, "memory was punched under a reader");
    finish(0, a);
    expect(actors[0].result == 0, "the reader got %lld of a flushed page", (long long)actors[0].result);
    expect(tm_trim(ctx_get(w->seg), 0) > 0, "nothing could be punched after the reader left");
    check(w);
}

/* Copy the changes of the pool to `to`; TM_OK or an error. */
static int64_t pass_on(const struct tm_handle *from, const struct tm_handle *to)
{
    uint8_t records[65536];
    struct tm_export e = {.pool = *from, .changes = true};
    int64_t n;
    while ((n = tm_export_fill(&e, records, sizeof records)) > 0)
        if ((n = tm_import(to, records, (size_t)n)) < 0)
            return n;
    return n;
}

/* Hand the client over to a staged one as far as freezing, and say what the copy holds of page 1. */
static int64_t copy_all(struct world *w, struct actor *a)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    struct tm_handle to = {.seg = w->seg};
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS, serial = atomic_load(&w->seg->clients[client].serial), id, staged;
    if (client_handoff(ctx, client, serial, PHASE_COPYING) != TM_OK || client_stage(ctx, "copy", &id, &staged) != TM_OK)
        return -100;
    pool_new(ctx, id, staged, &(struct pool_wish){.persistent = true, .id = -1}, &to.pool, &to.serial);
    if (pass_on(&w->pool, &to) < 0 || pass_on(&w->pool, &to) < 0)
        return -101;
    if (client_handoff(ctx, client, serial, PHASE_FROZEN) != TM_OK || pass_on(&w->pool, &to) < 0)
        return -102;
    int64_t rc = tm_get(&to, oid, 1, a->page, 1);
    client_handoff(ctx, client, serial, PHASE_NONE);
    client_destroy(ctx, id, staged);
    return rc;
}

/* A page is flushed after it was read for the copy and before that is noted: the copy must not keep it. */
static void export_and_flush(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t copier = start(0, copy_all, 80, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 1, 1);
    finish(0, copier);
    expect(actors[0].result == 0, "the copy says %lld of a flushed page", (long long)actors[0].result);
    check(w);
}

/* A page is flushed after it was read for the copy and that was noted: the next pass must say so. */
static void flush_after_export(struct world *w)
{
    put(&w->pool, 1, 1);
    put(&w->pool, 2, 1);
    pid_t copier = start(0, copy_all, 80, 1); /* at the other page */
    at_point(0);
    tm_flush(&w->pool, oid, 1, 1);
    finish(0, copier);
    expect(actors[0].result == 0, "the copy says %lld of a page that was flushed later", (long long)actors[0].result);
    check(w);
}

/* A page is put after it was read for the copy and before that is noted: the copy must have the new page. */
static void export_and_put(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t copier = start(0, copy_all, 80, 0);
    at_point(0);
    put(&w->pool, 1, 2);
    finish(0, copier);
    expect(actors[0].result == 1 && is(actors[0].page, 1, 2), "the copy has not got the new page");
    check(w);
}

/* A put is under way while its client is frozen for the last pass: who freezes waits for it, and copies it. */
static void put_and_freeze(struct world *w)
{
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS;
    put(&w->pool, 1, 1);
    pid_t putter = start(0, put_two, 45, 0);
    at_point(0);
    pid_t copier = start(1, copy_all, 0, 0);
    for (int i = 0; i < 25000 && phase_of(w->seg, client) != PHASE_FROZEN; i++)
        nap();
    expect(phase_of(w->seg, client) == PHASE_FROZEN && !atomic_load(&actors[1].finished), "nobody waits for the put");
    finish(0, putter);
    finish(1, copier);
    expect(actors[0].result == 1, "the put says %lld", (long long)actors[0].result);
    expect(actors[1].result == 1 && is(actors[1].page, 1, 2), "the copy says %lld", (long long)actors[1].result);
    check(w);
}

static int64_t withdraw_tier(struct world *w, struct actor *a)
{
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS;
    (void)a;
    return client_set_tiered(ctx_get(w->seg), client, atomic_load(&w->seg->clients[client].serial), false);
}

/* A put has seen that its client has a tier, and is slow; the tier is taken away, and the client copied: the mark that the
 * page was used must not say that it was passed on. */
static void use_noted_while_copied(struct world *w)
{
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS;
    client_set_tiered(ctx_get(w->seg), client, atomic_load(&w->seg->clients[client].serial), true);
    put(&w->pool, 2, 1);
    pid_t putter = start(0, put_two, 40, 0);
    at_point(0);
    pid_t withdrawer = start(2, withdraw_tier, 105, 0);
    at_point(2);
    pid_t copier = start(1, copy_all, 80, 0);
    gets_to(1, &actors[1].reached); /* it should wait for the put */
    finish(0, putter);
    at_point(1);
    finish(1, copier);
    finish(2, withdrawer);
    expect(actors[0].result == 1, "the put says %lld", (long long)actors[0].result);
    expect(actors[1].result == 1 && is(actors[1].page, 1, 2), "the copy says %lld of a page that is stored",
           (long long)actors[1].result);
    check(w);
}

static int64_t reap(struct world *w, struct actor *a)
{
    (void)a;
    return (int64_t)tm_reap(ctx_get(w->seg));
}

/* A put is killed between its swap and its counts: the sums are off by a page. */
static void die_uncounted(void)
{
    pid_t putter = start(1, put_two, 41, 0);
    at_point(1);
    die(putter);
}

/* A reaper has looked at the slots when a thread dies that has just swapped one of them: what that one did not count
 * is not in the sums that the reaper found, so somebody must count again. */
static void death_beside_recount(struct world *w)
{
    put(&w->pool, 2, 1); /* the leaf exists: it would be counted */
    atomic_store(&w->seg->super->recount, 1);
    pid_t reaper = start(0, reap, 34, 0);
    at_point(0);
    die_uncounted();
    finish(2, start(2, get_one, 0, 0)); /* has the dead one's record, and so has repaired it */
    finish(0, reaper);
    check(w);
}

/* The same, and another reaper has corrected the sums before: the first one must not take that back. */
static void recount_beside_recount(struct world *w)
{
    put(&w->pool, 2, 1);
    atomic_store(&w->seg->super->recount, 1);
    pid_t reaper = start(0, reap, 34, 0);
    at_point(0);
    die_uncounted();
    tm_reap(ctx_get(w->seg));
    finish(0, reaper);
    check(w);
}

/* A reaper dies half way through correcting the sums. */
static void death_in_recount(struct world *w)
{
    die_uncounted();
    pid_t reaper = start(0, reap, 35, 1);
    at_point(0);
    die(reaper);
    check(w);
}

/* Two reapers have counted, and correct the sums: the difference must be added once. */
static void two_recounts(struct world *w)
{
    die_uncounted();
    pid_t second = start(2, reap, 36, 0);
    at_point(2);
    atomic_store(&w->seg->super->recount, 1); /* another death, so that two count */
    pid_t first = start(0, reap, 35, 0);
    at_point(0);
    let_second_go_first(w, first, second);
}

/* A flush is between its change of the sums and its count of it when a reaper, which has waited for all who were in an
 * operation, comes to correct the sums: nothing of the flush may be taken back. */
static void uncounted_beside_recount(struct world *w)
{
    put(&w->pool, 1, 1);
    atomic_store(&w->seg->super->recount, 1);
    pid_t reaper = start(0, reap, 36, 0);
    at_point(0);
    pid_t flusher = start(1, flush_one, 47, 0);
    at_point(1);
    finish(0, reaper);
    finish(1, flusher);
    check(w);
}

/* A reaper has looked at objects and not yet at the sums when an empty object goes, which no page's change shows. */
static void object_beside_recount(struct world *w)
{
    put(&w->pool, 1, 1);
    tm_flush_object(&w->pool, oid);
    atomic_store(&w->seg->super->emptied, 0); /* so that the reaper itself does not look for it */
    atomic_store(&w->seg->super->look, 0);
    atomic_store(&w->seg->super->recount, 1);
    pid_t reaper = start(0, reap, 37, 0);
    at_point(0);
    expect(object_reap_empty(ctx_get(w->seg), 100) == 1, "the object did not go");
    finish(0, reaper);
    check(w);
}

/* Count again, when told to, and stop at `point` of that. */
static int64_t reap_later(struct world *w, struct actor *a, uint32_t point)
{
    wait_first(w, a, point);
    return reap(w, a);
}
static int64_t reap_to_37(struct world *w, struct actor *a) { return reap_later(w, a, 37); }
static int64_t reap_to_38(struct world *w, struct actor *a) { return reap_later(w, a, 38); }

/* A reaper has begun to correct the sums when another one looks at them: that one must see them corrected. */
static void recount_in_recount(struct world *w)
{
    pid_t second = start(2, reap_to_37, 99, 0);
    at_point(2);
    die_uncounted();
    pid_t first = start(0, reap, 35, 0);
    at_point(0);
    atomic_store(&w->seg->super->recount, 1); /* another death, so that two count */
    go_on(2);
    let_second_go_first(w, first, second);
}

/* A thread dies when it has taken an object off the sums and not noted that; whoever repairs it does so again. A reaper
 * that counts in between must not be the last one. */
static void recount_beside_repair(struct world *w)
{
    put(&w->pool, 1, 1);
    tm_flush_object(&w->pool, oid);
    pid_t repairer = start(1, reap_to_38, 99, 0);
    at_point(1);
    pid_t killer = start(0, reap_empty, 24, 0);
    at_point(0);
    die(killer);
    go_on(1);
    tm_reap(ctx_get(w->seg));
    finish(1, repairer);
    check(w);
}

/* Pages are stored smaller after a reaper has looked at them. */
static void recode_beside_recount(struct world *w)
{
    uint64_t spent_ns;
    for (uint32_t i = 0; i < 20; i++)
        put(&w->ephemeral, i, 1);
    atomic_store(&w->seg->super->recount, 1);
    pid_t reaper = start(0, reap, 34, 0);
    at_point(0);
    tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_LOOSE, &spent_ns, NULL);
    expect(atomic_load(&w->seg->super->squeezed_bytes) > 0, "the scenario did not come about");
    finish(0, reaper);
    check(w);
}

static const struct scenario scenarios[] = {
    {"reader_and_reuse", reader_and_reuse},       {"repair_beside_living", repair_beside_living},
    {"freed_and_reused", freed_and_reused},       {"take_and_replace", take_and_replace},
    {"put_and_destroy", put_and_destroy},         {"put_and_reap", put_and_reap},
    {"put_and_dead_reaper", put_and_dead_reaper}, {"reap_and_put", reap_and_put},
    {"use_noted_while_copied", use_noted_while_copied},
    {"reader_and_punch", reader_and_punch},       {"export_and_flush", export_and_flush},
    {"flush_after_export", flush_after_export},
    {"export_and_put", export_and_put},           {"put_and_freeze", put_and_freeze},
    {"death_beside_recount", death_beside_recount}, {"death_in_recount", death_in_recount},
    {"recount_beside_recount", recount_beside_recount}, {"two_recounts", two_recounts},
    {"recode_beside_recount", recode_beside_recount}, {"uncounted_beside_recount", uncounted_beside_recount},
    {"object_beside_recount", object_beside_recount}, {"recount_in_recount", recount_in_recount},
    {"recount_beside_repair", recount_beside_repair},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
