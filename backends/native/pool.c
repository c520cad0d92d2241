/* The tables of clients and pools. Changes are made under the control lock and commit with the store of `state`,
 * so a death leaves either nothing or everything; what operations check is `state` and `serial`. */
#include "tm.h"

#include <sched.h>
#include <string.h>

enum { FREE, LIVE, DYING };

static struct tm_lock *control(struct tm_segment *seg)
{
    lock_take(&seg->super->control);
    return &seg->super->control;
}

int client_open(struct tm_ctx *ctx, const char *name, bool create, uint32_t *id, uint32_t *serial)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t empty = TM_MAX_CLIENTS, found = TM_MAX_CLIENTS;
    struct tm_lock *lock = control(seg);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS && found == TM_MAX_CLIENTS; i++) {
        uint32_t state = atomic_load(&seg->clients[i].state);
        if (state == FREE && empty == TM_MAX_CLIENTS)
            empty = i;
        if (state == LIVE && strncmp(seg->clients[i].name, name, TM_NAME) == 0)
            found = i;
    }
    if (found == TM_MAX_CLIENTS && create && empty < TM_MAX_CLIENTS) {
        struct tm_client *c = &seg->clients[found = empty];
        for (uint32_t bin = 0; bin < 2 * TM_NCLASSES; bin++)
            bin_ready(seg, bin_ephemeral(found, 0, 0) + bin);
        memset(c->name, 0, sizeof c->name);
        strncpy(c->name, name, TM_NAME - 1);
        atomic_store(&c->cap_bytes, 0);
        atomic_store(&c->used_bytes, 0);
        atomic_store(&c->evict_clock, 0);
        atomic_fetch_add(&c->serial, 1);
        atomic_store(&c->state, LIVE);
    }
    if (found < TM_MAX_CLIENTS) {
        *id = found;
        *serial = atomic_load(&seg->clients[found].serial);
    }
    lock_drop(lock);
    return found < TM_MAX_CLIENTS ? TM_OK : create ? TM_FULL : TM_MISS;
}

static bool client_lives(struct tm_segment *seg, uint32_t id, uint32_t serial)
{
    return atomic_load(&seg->clients[id].state) == LIVE && atomic_load(&seg->clients[id].serial) == serial;
}

int pool_new(struct tm_ctx *ctx, uint32_t client, uint32_t client_serial, bool persistent, bool exclusive,
             uint32_t *pool, uint32_t *serial)
{
    struct tm_segment *seg = ctx->seg;
    int rc = TM_NOPOOL;
    struct tm_lock *lock = control(seg);
    if (client_lives(seg, client, client_serial)) {
        rc = TM_FULL;
        for (uint32_t i = client * TM_CLIENT_POOLS; i < (client + 1) * TM_CLIENT_POOLS && rc == TM_FULL; i++) {
            struct tm_pool *p = &seg->pools[i];
            if (atomic_load(&p->state) != FREE)
                continue;
            for (uint32_t leaf = 0; leaf < 3; leaf++)
                bin_ready(seg, BIN_LEAF + i * 3 + leaf);
            p->persistent = persistent;
            p->exclusive = exclusive;
            atomic_store(&p->pages, 0);
            atomic_store(&p->fill_pages, 0);
            atomic_store(&p->raw_pages, 0);
            atomic_store(&p->bytes, 0);
            for (unsigned k = 0; k < C_NCOUNTERS; k++)
                atomic_store(&p->counters[k], 0);
            *serial = atomic_fetch_add(&p->serial, 1) + 1;
            *pool = i;
            atomic_store(&p->state, LIVE);
            rc = TM_OK;
        }
    }
    lock_drop(lock);
    return rc;
}

/* Go on with a dying pool. Several may do so at once. */
static bool finish(struct tm_ctx *ctx, uint32_t pool)
{
    struct tm_segment *seg = ctx->seg;
    /* Whoever entered before the pool began to die has left after this; nobody enters any more. */
    if (!grace(ctx, 5000) || !pool_sweep(ctx, pool))
        return false;
    struct tm_lock *lock = control(seg);
    if (atomic_load(&seg->pools[pool].state) == DYING)
        atomic_store(&seg->pools[pool].state, FREE);
    lock_drop(lock);
    return true;
}

static void doom(struct tm_segment *seg, uint32_t pool, uint32_t serial, bool *was_live)
{
    struct tm_lock *lock = control(seg);
    *was_live = atomic_load(&seg->pools[pool].state) == LIVE && atomic_load(&seg->pools[pool].serial) == serial;
    if (*was_live)
        atomic_store(&seg->pools[pool].state, DYING);
    lock_drop(lock);
}

int pool_destroy(struct tm_ctx *ctx, uint32_t pool, uint32_t serial)
{
    bool was_live;
    doom(ctx->seg, pool, serial, &was_live);
    if (!was_live)
        return TM_NOPOOL;
    KP(60);
    for (unsigned tries = 0; tries < 5; tries++) {
        if (finish(ctx, pool))
            return TM_OK;
        sched_yield();
    }
    return TM_OK; /* its pages are out of reach; a reaper frees them when whoever is stopped goes on */
}

int client_destroy(struct tm_ctx *ctx, uint32_t id, uint32_t serial)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control(seg);
    bool lives = client_lives(seg, id, serial);
    if (lives)
        atomic_store(&seg->clients[id].state, DYING);
    lock_drop(lock);
    if (!lives)
        return TM_NOPOOL;
    for (uint32_t i = id * TM_CLIENT_POOLS; i < (id + 1) * TM_CLIENT_POOLS; i++)
        pool_destroy(ctx, i, atomic_load(&seg->pools[i].serial));
    pool_finish_dying(ctx);
    return TM_OK;
}

void pool_finish_dying(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        struct tm_client *c = &seg->clients[i];
        bool left = false;
        if (atomic_load(&c->state) == FREE)
            continue;
        for (uint32_t p = i * TM_CLIENT_POOLS; p < (i + 1) * TM_CLIENT_POOLS; p++) {
            if (atomic_load(&c->state) == DYING && atomic_load(&seg->pools[p].state) == LIVE) {
                bool was_live; /* its client's destroyer died on the way */
                doom(seg, p, atomic_load(&seg->pools[p].serial), &was_live);
            }
            if (atomic_load(&seg->pools[p].state) == DYING)
                left |= !finish(ctx, p);
        }
        if (!left && atomic_load(&c->state) == DYING) {
            struct tm_lock *lock = control(seg);
            if (atomic_load(&c->state) == DYING)
                atomic_store(&c->state, FREE);
            lock_drop(lock);
        }
    }
}
