/* Pools: their table, sharing, and the end of pools and clients. Changes are made under the control lock and commit with the store of `state`,
 * so a death leaves either nothing or everything; what operations check is `state` and `serial`. Whatever else
 * follows from the states (who shares a pool, how many have floors) is derived anew after a death.
 *
 * A shared pool has a number behind those of the clients. What its members have is a pool of their own that links
 * to it; entering an operation follows the link. */
#include "tm.h"

#include <sched.h>
#include <string.h>

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
    if (!sharers) {
        if (atomic_load(&seg->pools[number + TM_MAX_SHARED].state) == LIVE)
            atomic_store(&seg->pools[number + TM_MAX_SHARED].state, DYING); /* first: who dies here is followed by another */
        atomic_store(&p->state, DYING);
    }
    if (sharers && !(sharers & client_bit(owner)) && !MUTANT(8))
        atomic_store(&p->owner, next_sharer(sharers, owner)); /* and with it the account, exactly */
}

/* The holder of the control lock died: derive what follows from states, and finish what it had committed. */
static void repair_tables(struct tm_segment *seg)
{
    uint64_t members[TM_MAX_SHARED] = {0};
    uint32_t floors = 0;
    for (uint32_t p = 0; p < TM_FIRST_SHARED; p++) {
        uint32_t link = seg->pools[p].link;
        if (atomic_load(&seg->pools[p].state) == LIVE && link >= TM_FIRST_SHARED && link < TM_FIRST_SHARED_ORIGINALS)
            members[link - TM_FIRST_SHARED] |= client_bit(p / TM_CLIENT_POOLS);
    }
    for (uint32_t i = 0; i < TM_MAX_SHARED; i++)
        if (atomic_load(&seg->pools[TM_FIRST_SHARED + i].state) == LIVE)
            share_among(seg, TM_FIRST_SHARED + i, members[i]);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        floors += atomic_load(&seg->clients[i].state) != FREE && atomic_load(&seg->clients[i].floor_bytes);
    atomic_store(&seg->super->nfloors, floors);
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++)
        if (atomic_load(&seg->threads[i].commits))
            client_show_staged(seg, i);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++)
        client_note_held(seg, i, TM_MAX_THREADS);
}

struct tm_lock *control_lock(struct tm_segment *seg)
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
struct tm_lock *control_of(struct tm_segment *seg, uint32_t id, uint32_t serial)
{
    struct tm_lock *lock = control_lock(seg);
    if (client_lives(seg, id, serial))
        return lock;
    lock_drop(lock);
    return NULL;
}

/* The client's membership in the shared pool `uuid`, TM_MAX_POOLS if there is none. Under the control lock. */
uint32_t pool_membership(struct tm_segment *seg, uint32_t client, const uint8_t *uuid)
{
    for (uint32_t p = client * TM_CLIENT_POOLS; p < (client + 1) * TM_CLIENT_POOLS; p++)
        if (atomic_load(&seg->pools[p].state) == LIVE && seg->pools[p].link
            && memcmp(seg->pools[seg->pools[p].link].uuid, uuid, TM_UUID) == 0)
            return p;
    return TM_MAX_POOLS;
}

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
    atomic_store(&p->tier_pages, 0);
    atomic_store(&p->twin_pages, 0);
    atomic_store(&p->packed_pages, 0);
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
    for (uint32_t p = TM_FIRST_SHARED; p < TM_FIRST_SHARED_ORIGINALS; p++) {
        uint32_t state = atomic_load(&seg->pools[p].state);
        if (state == LIVE && memcmp(seg->pools[p].uuid, wish->uuid, TM_UUID) == 0)
            return p;
        if (state == FREE && atomic_load(&seg->pools[p + TM_MAX_SHARED].state) == FREE && empty == TM_MAX_POOLS)
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
    atomic_store(&account->begun, 0);
    pool_make(seg, empty, wish, 0);
    memcpy(seg->pools[empty].uuid, wish->uuid, TM_UUID);
    atomic_store(&seg->pools[empty].owner, client);
    atomic_store(&seg->pools[empty].state, LIVE);
    KP(64);
    return empty;
}

void pool_new_originals(struct tm_ctx *ctx, uint32_t shared)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control_lock(seg);
    uint32_t pool = shared + TM_MAX_SHARED;
    if (atomic_load(&seg->pools[shared].state) == LIVE && atomic_load(&seg->pools[pool].state) == FREE) {
        pool_make(seg, pool, &(struct pool_wish){.id = -1}, 0);
        atomic_store(&seg->pools[pool].state, LIVE);
    }
    lock_drop(lock);
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
        if (atomic_load(&seg->pools[first + i].state) == FREE && (wish->id < 0 ? i < TM_USER_POOLS : wish->id == (int)i))
            found = first + i;
    if (found == TM_MAX_POOLS)
        rc = wish->id < 0 ? TM_FULL : TM_TAKEN;
    else if (wish->uuid && !client_authorised(&seg->clients[client], wish->uuid))
        rc = TM_DENIED;
    else if (wish->uuid && pool_membership(seg, client, wish->uuid) < TM_MAX_POOLS)
        rc = TM_TAKEN;
    else if (!wish->uuid || (link = shared_open(seg, client, wish)) < TM_MAX_POOLS)
        rc = TM_OK;
    if (rc == TM_OK) {
        pool_make(seg, found, wish, link);
        if (link) {
            atomic_fetch_or(&seg->pools[link].sharers, client_bit(client));
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
    if (p->link || is_originals(pool))
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
    uint32_t shared = atomic_load(&seg->pools[link].serial);
    if (link && atomic_load(&seg->pools[link].state) == LIVE)
        pool_drop(ctx, link, shared, pool / TM_CLIENT_POOLS + 1); /* semantics K2 */
    if (!link && !pool_sweep(ctx, pool, serial))
        return false;
    KP(66);
    struct tm_lock *lock = control_lock(seg);
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
        share_among(seg, link, atomic_load(&seg->pools[link].sharers) & ~client_bit(pool / TM_CLIENT_POOLS));
    return true;
}

int pool_destroy(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    struct tm_lock *lock = control_lock(ctx->seg);
    uint32_t link = ctx->seg->pools[pool].link;
    bool mine = doom(ctx->seg, pool, serial);
    lock_drop(lock);
    if (!mine)
        return TM_NOPOOL;
    KP(60);
    for (unsigned tries = 0; tries < 5; tries++) {
        if (finish(ctx, pool, serial)
            && (!link || (finish_if_dying(ctx, link) && finish_if_dying(ctx, link + TM_MAX_SHARED))))
            return TM_OK;
        sched_yield();
    }
    return TM_OK; /* its pages are out of reach; a reaper frees them when whoever is stopped goes on */
}

/* The number is free again. Under the control lock. */
static void client_end(struct tm_segment *seg, uint32_t id)
{
    client_store_floor(seg, id, 0);
    for (uint32_t i = 0; i < TM_MAX_THREADS; i++)
        if (atomic_load(&seg->threads[i].serves) & client_bit(id))
            atomic_fetch_and(&seg->threads[i].serves, ~client_bit(id));
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
            struct tm_lock *lock = control_lock(seg);
            doom_all(seg, i);
            lock_drop(lock);
        }
        for (uint32_t p = i * TM_CLIENT_POOLS; p < (i + 1) * TM_CLIENT_POOLS; p++)
            left |= !finish_if_dying(ctx, p);
        if (!dying || left)
            continue;
        struct tm_lock *lock = control_lock(seg);
        for (uint32_t p = i * TM_CLIENT_POOLS; p < (i + 1) * TM_CLIENT_POOLS; p++)
            left |= atomic_load(&seg->pools[p].state) != FREE;
        if (!left && atomic_load(&c->state) == DYING)
            client_end(seg, i);
        lock_drop(lock);
    }
    for (uint32_t p = TM_FIRST_SHARED; p < TM_MAX_POOLS; p++)
        finish_if_dying(ctx, p);
}
