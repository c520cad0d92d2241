/* The tables of clients and pools. Changes are made under the control lock and commit with the store of `state`,
 * so a death leaves either nothing or everything; what operations check is `state` and `serial`. Whatever else
 * follows from the states (who shares a pool, how many have floors) is derived anew after a death.
 *
 * A shared pool has a number behind those of the clients. What its members have is a pool of their own that links
 * to it; entering an operation follows the link. */
#include "tm.h"

#include <sched.h>
#include <string.h>

static uint64_t bit_of(uint32_t client) { return UINT64_C(1) << client; }

/* The client after `client` among `sharers`, around. */
static uint32_t next_sharer(uint64_t sharers, uint32_t client)
{
    uint64_t behind = client == TM_MAX_CLIENTS - 1 ? 0 : sharers & ~((UINT64_C(2) << client) - 1);
    return (uint32_t)__builtin_ctzll(behind ? behind : sharers);
}

/* Of shared pool `number`: nobody but `sharers` has it now. */
static void share_among(struct tm_segment *seg, uint32_t number, uint64_t sharers)
{
    struct tm_pool *p = &seg->pools[number];
    uint32_t owner = atomic_load(&p->owner);
    atomic_store(&p->sharers, sharers);
    KP(61);
    if (!sharers)
        atomic_store(&p->state, DYING);
    else if (!(sharers & bit_of(owner)) && !MUTANT(8))
        atomic_store(&p->owner, next_sharer(sharers, owner)); /* and with it the account, exactly */
}

static void show_staged(struct tm_segment *seg, uint32_t index);
static void note_held(struct tm_segment *seg, uint32_t id, uint32_t but);

/* The holder of the control lock died: derive what follows from states, and finish what it had committed. */
static void repair_tables(struct tm_segment *seg)
{
    uint64_t members[TM_MAX_SHARED] = {0};
    uint32_t floors = 0;
    for (uint32_t p = 0; p < TM_FIRST_SHARED; p++) {
        uint32_t link = seg->pools[p].link;
        if (atomic_load(&seg->pools[p].state) == LIVE && link >= TM_FIRST_SHARED && link < TM_MAX_POOLS)
            members[link - TM_FIRST_SHARED] |= bit_of(p / TM_CLIENT_POOLS);
    }
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++)
        if (atomic_load(&seg->pools[TM_FIRST_SHARED + i].state) == LIVE)
            share_among(seg, TM_FIRST_SHARED + i, members[i]);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        floors += atomic_load(&seg->clients[i].state) != FREE && atomic_load(&seg->clients[i].floor_bytes);
    atomic_store(&seg->super->nfloors, floors);
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++)
        if (atomic_load(&seg->threads[i].commits))
            show_staged(seg, i);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        note_held(seg, i, TM_MAX_THREADS);
}

static struct tm_lock *control(struct tm_segment *seg)
{
    if (lock_take(&seg->super->control))
        repair_tables(seg);
    return &seg->super->control;
}

bool client_lives(struct tm_segment *seg, uint32_t id, uint32_t serial)
{
    uint32_t state = atomic_load(&seg->clients[id].state);
    return (state == LIVE || state == STAGED) && atomic_load(&seg->clients[id].serial) == serial;
}

/* Take the control lock for a change of a client that lives; NULL, and no lock, if it does not. */
static struct tm_lock *control_of(struct tm_segment *seg, uint32_t id, uint32_t serial)
{
    struct tm_lock *lock = control(seg);
    if (client_lives(seg, id, serial))
        return lock;
    lock_drop(lock);
    return NULL;
}

/* ---- Clients ---------------------------------------------------------------------------------------------- */

/* The client of that name in `state`, or a free number in `*empty`; TM_MAX_CLIENTS where there is none. */
static uint32_t find_client(struct tm_segment *seg, const char *name, uint32_t *empty)
{
    uint32_t found = TM_MAX_CLIENTS;
    *empty = TM_MAX_CLIENTS;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS && found == TM_MAX_CLIENTS; i++) {
        uint32_t state = atomic_load(&seg->clients[i].state);
        if (state == FREE && *empty == TM_MAX_CLIENTS)
            *empty = i;
        if (state == LIVE && strncmp(seg->clients[i].name, name, TM_NAME) == 0)
            found = i;
    }
    return found;
}

static void client_make(struct tm_segment *seg, uint32_t id, const char *name, uint32_t state)
{
    struct tm_client *c = &seg->clients[id];
    for (uint32_t bin = 0; bin < 2 * TM_NCLASSES; bin++)
        bin_ready(seg, bin_ephemeral(id, 0, 0) + bin);
    memset(c->name, 0, sizeof c->name);
    strncpy(c->name, name, TM_NAME - 1);
    atomic_store(&c->cap_bytes, 0);
    atomic_store(&c->floor_bytes, 0);
    atomic_store(&c->used_bytes, 0);
    atomic_store(&c->evict_clock, 0);
    atomic_store(&c->weight, 100);
    atomic_store(&c->codec, CODEC_LZ4);
    atomic_store(&c->mode, MODE_ON);
    atomic_store(&c->phase, PHASE_NONE);
    atomic_store(&c->copier, 0);
    atomic_store(&c->stager, 0);
    atomic_store(&c->held, 0);
    atomic_store(&c->uuids_used, 0);
    atomic_store(&c->no_memory, 0);
    atomic_store(&c->busy_ns, 0);
    atomic_store(&c->ephemeral, 0);
    atomic_store(&c->ephemeral_most, 0);
    atomic_store(&c->retired_puts, 0);
    atomic_store(&c->retired_hits[0], 0);
    atomic_store(&c->retired_hits[1], 0);
    atomic_fetch_add(&c->serial, 1);
    atomic_store(&c->state, state);
}

int client_open(struct tm_ctx *ctx, const char *name, bool create, uint32_t *id, uint32_t *serial)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t empty;
    struct tm_lock *lock = control(seg);
    uint32_t found = find_client(seg, name, &empty);
    if (found == TM_MAX_CLIENTS && create && empty < TM_MAX_CLIENTS)
        client_make(seg, found = empty, name, LIVE);
    if (found < TM_MAX_CLIENTS) {
        *id = found;
        *serial = atomic_load(&seg->clients[found].serial);
    }
    lock_drop(lock);
    return found < TM_MAX_CLIENTS ? TM_OK : create ? TM_FULL : TM_MISS;
}

static bool staged_by(struct tm_segment *seg, uint32_t id, uint32_t thread)
{
    return atomic_load(&seg->clients[id].state) == STAGED && atomic_load(&seg->clients[id].stager) == thread + 1;
}

int client_stage(struct tm_ctx *ctx, const char *name, uint32_t *id, uint32_t *serial)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t empty;
    struct tm_lock *lock = control(seg);
    bool taken = find_client(seg, name, &empty) < TM_MAX_CLIENTS;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        taken |= staged_by(seg, i, ctx->index) && strncmp(seg->clients[i].name, name, TM_NAME) == 0;
    if (!taken && empty < TM_MAX_CLIENTS) {
        client_make(seg, empty, name, FREE);
        atomic_store(&seg->clients[empty].stager, ctx->index + 1);
        atomic_store(&seg->clients[empty].state, STAGED);
        *id = empty;
        *serial = atomic_load(&seg->clients[empty].serial);
    }
    lock_drop(lock);
    return taken ? TM_TAKEN : empty < TM_MAX_CLIENTS ? TM_OK : TM_FULL;
}

/* Show what thread `index` has staged: it said so with one store, and whoever repairs it goes on from there. */
static void show_staged(struct tm_segment *seg, uint32_t index)
{
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        if (staged_by(seg, i, index)) {
            atomic_store(&seg->clients[i].state, LIVE);
            KP(63);
        }
    atomic_store(&seg->threads[index].commits, 0);
}

int client_commit(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t unused;
    int n = 0;
    struct tm_lock *lock = control(seg);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS && n >= 0; i++)
        if (staged_by(seg, i, ctx->index))
            n = find_client(seg, seg->clients[i].name, &unused) < TM_MAX_CLIENTS ? TM_TAKEN : n + 1;
    if (n > 0) {
        KP(62);
        atomic_store(&ctx->rec->commits, 1);
        show_staged(seg, ctx->index);
    }
    lock_drop(lock);
    return n;
}

/* Under the control lock: does any thread, `but` that one, hold the client? */
static void note_held(struct tm_segment *seg, uint32_t id, uint32_t but)
{
    bool any = false;
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t i = 0; i < n; i++)
        any |= i != but && (atomic_load(&seg->threads[i].serves) & bit_of(id)) != 0;
    if (any || atomic_load(&seg->clients[id].held))
        atomic_store(&seg->clients[id].held, any ? 1 : 2);
}

int client_hold(struct tm_ctx *ctx, uint32_t id, uint32_t serial)
{
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    atomic_fetch_or(&ctx->rec->serves, bit_of(id));
    note_held(ctx->seg, id, TM_MAX_THREADS);
    lock_drop(lock);
    return TM_OK;
}

void client_release(struct tm_ctx *ctx, uint32_t index)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t served = atomic_load(&seg->threads[index].serves), any = served;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        any |= atomic_load(&seg->clients[i].copier) == index + 1 || atomic_load(&seg->clients[i].stager) == index + 1;
    if (!any)
        return;
    struct tm_lock *lock = control(seg);
    KP(91);
    if (atomic_load(&seg->threads[index].commits))
        show_staged(seg, index);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        struct tm_client *c = &seg->clients[i];
        if (served & bit_of(i))
            note_held(seg, i, index);
        if (atomic_load(&c->copier) == index + 1) {
            if (atomic_load(&c->phase) != PHASE_DEPARTED)
                atomic_store(&c->phase, PHASE_NONE);
            atomic_store(&c->copier, 0);
        }
        if (staged_by(seg, i, index))
            atomic_store(&c->state, DYING); /* a reaper frees it */
        if (atomic_load(&c->stager) == index + 1)
            atomic_store(&c->stager, 0);
    }
    atomic_store(&seg->threads[index].serves, 0); /* last: a repairer that dies is followed by another */
    lock_drop(lock);
}

int client_authorise(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const uint8_t *uuid)
{
    struct tm_client *c = &ctx->seg->clients[id];
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    int rc = TM_FULL;
    if (!lock)
        return TM_NOPOOL;
    uint32_t used = atomic_load(&c->uuids_used);
    for (uint32_t i = 0; i < TM_MAX_UUIDS; i++)
        if (used >> i & 1 && memcmp(c->uuids[i], uuid, TM_UUID) == 0)
            rc = TM_OK;
    for (uint32_t i = 0; i < TM_MAX_UUIDS && rc == TM_FULL; i++)
        if (!(used >> i & 1)) {
            memcpy(c->uuids[i], uuid, TM_UUID);
            atomic_store(&c->uuids_used, used | 1u << i);
            rc = TM_OK;
        }
    lock_drop(lock);
    return rc;
}

static bool authorised(const struct tm_client *c, const uint8_t *uuid)
{
    for (uint32_t i = 0; i < TM_MAX_UUIDS; i++)
        if (atomic_load(&c->uuids_used) >> i & 1 && memcmp(c->uuids[i], uuid, TM_UUID) == 0)
            return true;
    return false;
}

/* The client's membership in the shared pool `uuid`, TM_MAX_POOLS if there is none. Under the control lock. */
static uint32_t membership(struct tm_segment *seg, uint32_t client, const uint8_t *uuid)
{
    for (uint32_t p = client * TM_CLIENT_POOLS; p < (client + 1) * TM_CLIENT_POOLS; p++)
        if (atomic_load(&seg->pools[p].state) == LIVE && seg->pools[p].link
            && memcmp(seg->pools[seg->pools[p].link].uuid, uuid, TM_UUID) == 0)
            return p;
    return TM_MAX_POOLS;
}

int client_revoke(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const uint8_t *uuid)
{
    struct tm_client *c = &ctx->seg->clients[id];
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    int rc = TM_MISS;
    uint32_t pool_serial = 0;
    if (!lock)
        return TM_NOPOOL;
    for (uint32_t i = 0; i < TM_MAX_UUIDS; i++)
        if (atomic_load(&c->uuids_used) >> i & 1 && memcmp(c->uuids[i], uuid, TM_UUID) == 0) {
            atomic_fetch_and(&c->uuids_used, ~(1u << i));
            rc = TM_OK;
        }
    uint32_t pool = membership(ctx->seg, id, uuid);
    if (pool < TM_MAX_POOLS)
        pool_serial = atomic_load(&ctx->seg->pools[pool].serial);
    lock_drop(lock);
    if (pool < TM_MAX_POOLS)
        pool_destroy(ctx, pool, pool_serial);
    return rc;
}

/* Drop what turned-off clients have in ephemeral pools. */
static void drop_ephemeral(struct tm_ctx *ctx, uint32_t first, uint32_t end)
{
    for (uint32_t p = first; p < end; p++)
        if (atomic_load(&ctx->seg->pools[p].state) == LIVE && !ctx->seg->pools[p].persistent && !ctx->seg->pools[p].link)
            pool_drop(ctx, p, 0);
}

/* Turned off, the pools are emptied once every operation that could put more has ended; and again before they are
 * turned on, in case somebody had been stopped in one: nothing from before may be seen (semantics D6). */
static int before_mode(struct tm_ctx *ctx, uint32_t old, uint32_t next, uint32_t first, uint32_t end)
{
    if (old != MODE_OFF || next == MODE_OFF)
        return TM_OK;
    if (!grace(ctx, 5000))
        return TM_BUSY;
    drop_ephemeral(ctx, first, end);
    return TM_OK;
}

static int after_mode(struct tm_ctx *ctx, uint32_t next, uint32_t first, uint32_t end)
{
    KP(69);
    bool settled = next == MODE_ON || grace(ctx, 5000);
    if (next == MODE_OFF)
        drop_ephemeral(ctx, first, end);
    return settled ? TM_OK : TM_BUSY;
}

int client_set_mode(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t mode)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t first = id * TM_CLIENT_POOLS, end = first + TM_CLIENT_POOLS;
    if (!client_lives(seg, id, serial))
        return TM_NOPOOL;
    int rc = before_mode(ctx, atomic_load(&seg->clients[id].mode), mode, first, end);
    struct tm_lock *lock = rc == TM_OK ? control_of(seg, id, serial) : NULL; /* anew: the number may be another's */
    if (!lock)
        return rc == TM_OK ? TM_NOPOOL : rc;
    atomic_store(&seg->clients[id].mode, mode);
    lock_drop(lock);
    return after_mode(ctx, mode, first, end);
}

int segment_set_mode(struct tm_ctx *ctx, uint32_t mode)
{
    int rc = before_mode(ctx, atomic_load(&ctx->seg->super->mode), mode, 0, TM_MAX_POOLS);
    if (rc == TM_OK) {
        atomic_store(&ctx->seg->super->mode, mode);
        rc = after_mode(ctx, mode, 0, TM_MAX_POOLS);
    }
    return rc;
}

bool client_set(struct tm_ctx *ctx, uint32_t id, uint32_t serial, enum client_value which, uint64_t value)
{
    struct tm_client *c = &ctx->seg->clients[id];
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    if (!lock)
        return false;
    if (which == VALUE_CAP)
        atomic_store(&c->cap_bytes, value);
    else
        atomic_store(which == VALUE_WEIGHT ? &c->weight : &c->codec, (uint32_t)value);
    lock_drop(lock);
    return true;
}

static void store_floor(struct tm_segment *seg, uint32_t id, uint64_t bytes)
{
    bool had = atomic_exchange(&seg->clients[id].floor_bytes, bytes) != 0;
    if (had && !bytes)
        atomic_fetch_sub(&seg->super->nfloors, 1);
    else if (!had && bytes)
        atomic_fetch_add(&seg->super->nfloors, 1);
}

int client_set_floor(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t bytes)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control_of(seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    uint64_t before = atomic_load(&seg->clients[id].floor_bytes);
    if (bytes > seg->super->memory_bytes) {
        lock_drop(lock);
        return TM_TOO_MUCH;
    }
    store_floor(seg, id, bytes); /* from here on nobody takes what it needs */
    chunks_lock(seg);
    bool fits = bytes <= before || floors_fit(seg);
    chunks_unlock(seg);
    if (!fits)
        store_floor(seg, id, before);
    lock_drop(lock);
    return fits ? TM_OK : TM_TOO_MUCH;
}

/* In this order a copier that dies in between leaves a handoff that its repair ends. */
static void store_phase(struct tm_client *c, uint32_t phase, uint32_t copier)
{
    uint32_t serial = atomic_load(&c->serial);
    if (phase == PHASE_DEPARTED)
        atomic_store(&c->departed, serial); /* survives the client, for its servers */
    else if (atomic_load(&c->departed) == serial)
        atomic_store(&c->departed, 0);
    if (phase)
        atomic_store(&c->copier, copier);
    KP(90);
    atomic_store(&c->phase, phase);
    if (!phase)
        atomic_store(&c->copier, 0);
}

int client_handoff(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t phase)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_client *c = &seg->clients[id];
    struct tm_lock *lock = control_of(seg, id, serial);
    int rc = TM_OK;
    if (!lock)
        return TM_NOPOOL;
    uint32_t now = atomic_load(&c->phase), copier = atomic_load(&c->copier);
    if (copier && copier != ctx->index + 1)
        rc = TM_BUSY;
    else if (phase ? now != phase - 1 : now == PHASE_NONE)
        rc = TM_WRONG;
    if (rc == TM_OK)
        store_phase(c, phase, ctx->index + 1);
    lock_drop(lock);
    if (rc == TM_OK && phase >= PHASE_FROZEN && !grace(ctx, 5000)) {
        if ((lock = control_of(seg, id, serial))) {
            store_phase(c, phase - 1, ctx->index + 1);
            lock_drop(lock);
        }
        rc = TM_BUSY;
    }
    if (rc == TM_OK && phase == PHASE_COPYING)
        for (uint32_t p = id * TM_CLIENT_POOLS; p < (id + 1) * TM_CLIENT_POOLS; p++)
            if (atomic_load(&seg->pools[p].state) == LIVE && seg->pools[p].persistent)
                pool_unmark(ctx, p);
    return rc;
}

/* ---- Pools ------------------------------------------------------------------------------------------------ */

static void pool_make(struct tm_segment *seg, uint32_t pool, const struct pool_wish *wish, uint32_t link)
{
    struct tm_pool *p = &seg->pools[pool];
    for (uint32_t leaf = 0; leaf < 3; leaf++)
        bin_ready(seg, BIN_LEAF + pool * 3 + leaf);
    p->persistent = wish->persistent;
    p->exclusive = wish->exclusive;
    p->link = link;
    atomic_store(&p->sharers, 0);
    atomic_store(&p->owner, pool / TM_CLIENT_POOLS);
    atomic_store(&p->pages, 0);
    atomic_store(&p->fill_pages, 0);
    atomic_store(&p->raw_pages, 0);
    atomic_store(&p->bytes, 0);
    atomic_store(&p->pages_most, 0);
    atomic_store(&p->objects, 0);
    atomic_store(&p->objects_most, 0);
    atomic_store(&p->nodes, 0);
    atomic_store(&p->nodes_most, 0);
    for (unsigned k = 0; k < C_NCOUNTERS; k++)
        atomic_store(&p->counters[k], 0);
    atomic_fetch_add(&p->serial, 1);
}

/* The shared pool of that uuid, made for `client` if there is none; TM_MAX_POOLS if all are in use. */
static uint32_t shared_open(struct tm_segment *seg, uint32_t client, const struct pool_wish *wish)
{
    uint32_t empty = TM_MAX_POOLS;
    for (uint32_t p = TM_FIRST_SHARED; p < TM_MAX_POOLS; p++) {
        uint32_t state = atomic_load(&seg->pools[p].state);
        if (state == LIVE && memcmp(seg->pools[p].uuid, wish->uuid, TM_UUID) == 0)
            return p;
        if (state == FREE && empty == TM_MAX_POOLS)
            empty = p;
    }
    if (empty == TM_MAX_POOLS)
        return empty;
    struct tm_client *account = &seg->clients[account_of(empty)];
    for (uint32_t bin = 0; bin < 2 * TM_NCLASSES; bin++)
        bin_ready(seg, bin_ephemeral(account_of(empty), 0, 0) + bin);
    atomic_store(&account->used_bytes, 0);
    atomic_store(&account->ephemeral, 0);
    atomic_store(&account->ephemeral_most, 0);
    atomic_store(&account->evict_clock, 0);
    pool_make(seg, empty, wish, 0);
    memcpy(seg->pools[empty].uuid, wish->uuid, TM_UUID);
    atomic_store(&seg->pools[empty].owner, client);
    atomic_store(&seg->pools[empty].state, LIVE);
    KP(64);
    return empty;
}

int pool_new(struct tm_ctx *ctx, uint32_t client, uint32_t client_serial, const struct pool_wish *wish, uint32_t *pool,
             uint32_t *serial)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control_of(seg, client, client_serial);
    uint32_t found = TM_MAX_POOLS, link = 0, first = client * TM_CLIENT_POOLS;
    int rc = TM_FULL;
    if (!lock)
        return TM_NOPOOL;
    for (uint32_t i = 0; i < TM_CLIENT_POOLS && found == TM_MAX_POOLS; i++)
        if (atomic_load(&seg->pools[first + i].state) == FREE && (wish->id < 0 || wish->id == (int)i))
            found = first + i;
    if (found == TM_MAX_POOLS)
        rc = wish->id < 0 ? TM_FULL : TM_TAKEN;
    else if (wish->uuid && !authorised(&seg->clients[client], wish->uuid))
        rc = TM_DENIED;
    else if (wish->uuid && membership(seg, client, wish->uuid) < TM_MAX_POOLS)
        rc = TM_TAKEN;
    else if (!wish->uuid || (link = shared_open(seg, client, wish)) < TM_MAX_POOLS)
        rc = TM_OK;
    if (rc == TM_OK) {
        pool_make(seg, found, wish, link);
        if (link) {
            atomic_fetch_or(&seg->pools[link].sharers, bit_of(client));
            KP(65);
        }
        *serial = atomic_load(&seg->pools[found].serial);
        *pool = found;
        atomic_store(&seg->pools[found].state, LIVE);
    }
    lock_drop(lock);
    return rc;
}

/* Its counters live on in the client's and the segment's. */
static void retire(struct tm_segment *seg, uint32_t pool)
{
    struct tm_pool *p = &seg->pools[pool];
    if (pool < TM_FIRST_SHARED) {
        struct tm_client *c = &seg->clients[pool / TM_CLIENT_POOLS];
        atomic_fetch_add(&c->retired_hits[p->persistent != 0], atomic_load(&p->counters[C_HITS]));
        if (p->persistent)
            atomic_fetch_add(&c->retired_puts, atomic_load(&p->counters[C_STORED]));
    }
    if (p->link)
        return;
    atomic_fetch_add(&seg->super->retired_operations,
                     p->counters[C_PUTS] + p->counters[C_GETS] + p->counters[C_FLUSHES] + p->counters[C_OBJECT_FLUSHES]);
    atomic_fetch_add(&seg->super->retired_evictions, atomic_load(&p->counters[C_EVICTIONS]));
    if (!p->persistent)
        atomic_fetch_add(&seg->super->retired_new, p->counters[C_STORED] - p->counters[C_REPLACED]);
}

static bool is_dying(struct tm_segment *seg, uint32_t pool, uint32_t serial)
{
    return atomic_load(&seg->pools[pool].state) == DYING && atomic_load(&seg->pools[pool].serial) == serial;
}

/* Go on with a dying pool, or with a membership that is given up. Several may do so at once, and one of them may see
 * its number in use again: hence the serial. False: somebody is still in it. */
static bool finish(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t link = seg->pools[pool].link;
    /* Whoever entered before the pool began to die has left after this; nobody enters any more. */
    if (!grace(ctx, 5000))
        return false;
    if (!is_dying(seg, pool, serial))
        return true;
    if (link && atomic_load(&seg->pools[link].state) == LIVE)
        pool_drop(ctx, link, pool / TM_CLIENT_POOLS + 1); /* semantics K2 */
    if (!link && !pool_sweep(ctx, pool))
        return false;
    KP(66);
    struct tm_lock *lock = control(seg);
    if (is_dying(seg, pool, serial)) {
        retire(seg, pool);
        atomic_store(&seg->pools[pool].state, FREE);
    }
    lock_drop(lock);
    return true;
}

static bool finish_if_dying(struct tm_ctx *ctx, uint32_t pool)
{
    uint32_t serial = atomic_load(&ctx->seg->pools[pool].serial);
    return !is_dying(ctx->seg, pool, serial) || finish(ctx, pool, serial);
}

/* Begin the end of the pool if it is that of `serial`; under the control lock. */
static bool doom(struct tm_segment *seg, uint32_t pool, uint32_t serial)
{
    uint32_t link = seg->pools[pool].link;
    if (atomic_load(&seg->pools[pool].state) != LIVE || atomic_load(&seg->pools[pool].serial) != serial)
        return false;
    atomic_store(&seg->pools[pool].state, DYING);
    KP(67);
    if (link)
        share_among(seg, link, atomic_load(&seg->pools[link].sharers) & ~bit_of(pool / TM_CLIENT_POOLS));
    return true;
}

int pool_destroy(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    struct tm_lock *lock = control(ctx->seg);
    uint32_t link = ctx->seg->pools[pool].link;
    bool mine = doom(ctx->seg, pool, serial);
    lock_drop(lock);
    if (!mine)
        return TM_NOPOOL;
    KP(60);
    for (unsigned tries = 0; tries < 5; tries++) {
        if (finish(ctx, pool, serial) && (!link || finish_if_dying(ctx, link)))
            return TM_OK;
        sched_yield();
    }
    return TM_OK; /* its pages are out of reach; a reaper frees them when whoever is stopped goes on */
}

/* The number is free again. Under the control lock. */
static void client_end(struct tm_segment *seg, uint32_t id)
{
    store_floor(seg, id, 0);
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++)
        if (atomic_load(&seg->threads[i].serves) & bit_of(id))
            atomic_fetch_and(&seg->threads[i].serves, ~bit_of(id));
    atomic_store(&seg->clients[id].state, FREE);
}

/* Begin the end of all pools of a dying client. Never by number without the lock: the number may be another's. */
static void doom_all(struct tm_segment *seg, uint32_t id)
{
    for (uint32_t p = id * TM_CLIENT_POOLS; p < (id + 1) * TM_CLIENT_POOLS; p++)
        if (atomic_load(&seg->clients[id].state) == DYING)
            doom(seg, p, atomic_load(&seg->pools[p].serial));
}

int client_destroy(struct tm_ctx *ctx, uint32_t id, uint32_t serial)
{
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    atomic_store(&ctx->seg->clients[id].state, DYING);
    KP(68);
    doom_all(ctx->seg, id);
    lock_drop(lock);
    pool_finish_dying(ctx);
    return TM_OK;
}

void pool_finish_dying(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        struct tm_client *c = &seg->clients[i];
        bool left = false, dying = atomic_load(&c->state) == DYING;
        if (atomic_load(&c->state) == FREE)
            continue;
        if (dying) { /* its destroyer may have died on the way */
            struct tm_lock *lock = control(seg);
            doom_all(seg, i);
            lock_drop(lock);
        }
        for (uint32_t p = i * TM_CLIENT_POOLS; p < (i + 1) * TM_CLIENT_POOLS; p++)
            left |= !finish_if_dying(ctx, p);
        if (!dying || left)
            continue;
        struct tm_lock *lock = control(seg);
        for (uint32_t p = i * TM_CLIENT_POOLS; p < (i + 1) * TM_CLIENT_POOLS; p++)
            left |= atomic_load(&seg->pools[p].state) != FREE;
        if (!left && atomic_load(&c->state) == DYING)
            client_end(seg, i);
        lock_drop(lock);
    }
    for (uint32_t p = TM_FIRST_SHARED; p < TM_MAX_POOLS; p++)
        finish_if_dying(ctx, p);
}
