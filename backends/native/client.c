/* Clients: their table, who holds and who fills them, what they may do, and the steps of a handoff.
 *
 * Changes are made under the control lock. Nobody acts on a number alone: it may be another client's by then, so
 * whoever comes back to it compares the serial again. How a client ends is in pool.c, with its pools. */
#include "tm.h"

#include <string.h>

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
    atomic_store(&c->begun, 0);
    atomic_store(&c->tiered, 0);
    atomic_store(&c->unreachable, 0);
    atomic_store(&c->weight, 100);
    atomic_store(&c->codec, CODEC_AUTO);
    atomic_store(&c->dedup, 0);
    atomic_store(&c->mode, MODE_ON);
    atomic_store(&c->phase, PHASE_NONE);
    atomic_store(&c->copier, 0);
    atomic_store(&c->stager, 0);
    atomic_store(&c->held, 0);
    atomic_store(&c->uuids_used, 0);
    atomic_store(&c->no_memory, 0);
    atomic_store(&c->busy_ns, 0);
    timing_forget(seg, id);
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
    struct tm_lock *lock = control_lock(seg);
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
    struct tm_lock *lock = control_lock(seg);
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
void client_show_staged(struct tm_segment *seg, uint32_t index)
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
    struct tm_lock *lock = control_lock(seg);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS && n >= 0; i++)
        if (staged_by(seg, i, ctx->index))
            n = find_client(seg, seg->clients[i].name, &unused) < TM_MAX_CLIENTS ? TM_TAKEN : n + 1;
    if (n > 0) {
        KP(62);
        atomic_store(&ctx->rec->commits, 1);
        client_show_staged(seg, ctx->index);
    }
    lock_drop(lock);
    return n;
}

/* Under the control lock: does any thread, `but` that one, hold the client? */
void client_note_held(struct tm_segment *seg, uint32_t id, uint32_t but)
{
    bool any = false;
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t i = 0; i < n; i++)
        any |= i != but && (atomic_load(&seg->threads[i].serves) & client_bit(id)) != 0;
    if (any || atomic_load(&seg->clients[id].held))
        atomic_store(&seg->clients[id].held, any ? 1 : 2);
}

int client_hold(struct tm_ctx *ctx, uint32_t id, uint32_t serial)
{
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    atomic_fetch_or(&ctx->rec->serves, client_bit(id));
    client_note_held(ctx->seg, id, TM_MAX_THREADS);
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
    struct tm_lock *lock = control_lock(seg);
    KP(91);
    if (atomic_load(&seg->threads[index].commits))
        client_show_staged(seg, index);
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        struct tm_client *c = &seg->clients[i];
        if (served & client_bit(i))
            client_note_held(seg, i, index);
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

bool client_authorised(const struct tm_client *c, const uint8_t *uuid)
{
    for (uint32_t i = 0; i < TM_MAX_UUIDS; i++)
        if (atomic_load(&c->uuids_used) >> i & 1 && memcmp(c->uuids[i], uuid, TM_UUID) == 0)
            return true;
    return false;
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
    uint32_t pool = pool_membership(ctx->seg, id, uuid);
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
    for (uint32_t p = first; p < end; p++) {
        const struct tm_pool *pool = &ctx->seg->pools[p];
        uint32_t serial = atomic_load(&pool->serial); /* first: if it is another's by then, nothing is dropped */
        if (atomic_load(&pool->state) == LIVE && !pool->persistent && !pool->link)
            pool_drop(ctx, p, serial, 0);
    }
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
    switch (which) {
    case VALUE_CAP:
        atomic_store(&c->cap_bytes, value);
        break;
    case VALUE_WEIGHT:
        atomic_store(&c->weight, (uint32_t)value);
        break;
    case VALUE_CODEC:
        atomic_store(&c->codec, (uint32_t)value);
        break;
    case VALUE_DEDUP:
        atomic_store(&c->dedup, (uint32_t)value);
        break;
    }
    lock_drop(lock);
    return true;
}

/* Without a tier nothing is demoted and no use is noted once this returns TM_OK: whoever had seen it otherwise is done. */
int client_set_tiered(struct tm_ctx *ctx, uint32_t id, uint32_t serial, bool on)
{
    struct tm_client *c = &ctx->seg->clients[id];
    struct tm_lock *lock = control_of(ctx->seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    if (on && !atomic_load(&c->tiered))
        atomic_fetch_add(&c->tier_epoch, 1);
    atomic_store(&c->tiered, on);
    lock_drop(lock);
    KP(105);
    return on || grace(ctx, 5000) ? TM_OK : TM_BUSY;
}

void client_store_floor(struct tm_segment *seg, uint32_t id, uint64_t bytes)
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
    client_store_floor(seg, id, bytes); /* from here on nobody takes what it needs */
    chunks_lock(seg);
    bool fits = bytes <= before || floors_fit(seg, chunk_limit(seg, false));
    if (!fits && (fits = floors_fit(seg, chunk_limit(seg, true)))) /* the manager has said that there is memory */
        atomic_store(&seg->super->limit, chunk_limit(seg, true));
    chunks_unlock(seg);
    if (!fits)
        client_store_floor(seg, id, before);
    lock_drop(lock);
    return fits ? TM_OK : TM_TOO_MUCH;
}

int client_most_floor(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t *bytes)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control_of(seg, id, serial);
    if (!lock)
        return TM_NOPOOL;
    chunks_lock(seg);
    *bytes = most_floor(seg, id, chunk_limit(seg, true));
    chunks_unlock(seg);
    lock_drop(lock);
    return TM_OK;
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
    /* Of a client with a tier, slots must not say any more that a page was used: soon that means exported. Also of one that had
     * one until this moment: an operation that has seen it may still be about to say so. */
    bool had_tier = atomic_load(MUTANT(40) ? &c->tiered : &c->tier_epoch) != 0;
    bool waits = phase >= PHASE_FROZEN || (phase == PHASE_COPYING && had_tier);
    if (rc == TM_OK && waits && !grace(ctx, 5000)) {
        if ((lock = control_of(seg, id, serial))) {
            store_phase(c, phase - 1, ctx->index + 1);
            lock_drop(lock);
        }
        rc = TM_BUSY;
    }
    if (rc == TM_OK && phase == PHASE_COPYING)
        for (uint32_t p = id * TM_CLIENT_POOLS; p < (id + 1) * TM_CLIENT_POOLS; p++) {
            uint32_t pool_serial = atomic_load(&seg->pools[p].serial);
            if (client_lives(seg, id, serial) && atomic_load(&seg->pools[p].state) == LIVE && seg->pools[p].persistent)
                pool_unmark(ctx, p, pool_serial);
        }
    return rc;
}

/* Who hands the client over, or saves it, may be stopped (Ctrl-Z) or have died, and there may be no manager. */
void client_help_copier(struct tm_segment *seg, uint32_t id)
{
    uint32_t copier = atomic_load(&seg->clients[id].copier);
    struct tm_ctx *ctx = copier && atomic_load(&seg->super->alive) ? ctx_get(seg) : NULL;
    if (!ctx)
        return;
    continue_if_stopped((int)seg->threads[copier - 1].pid);
    tm_reap(ctx);
}
