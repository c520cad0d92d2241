/* A tier in memory outside the segment, of all clients, for the tests of the native core. What is forgotten is
 * overwritten at once, so that whoever still believes it is found out. One demoter at a time, told by a robust lock. */
#ifndef SHELF_H
#define SHELF_H

#include "witness.h"

enum { SHELF_RECORDS = 1536 };
struct shelf {
    struct tm_lock writer;
    _Atomic uint32_t used[SHELF_RECORDS];
    uint32_t client[SHELF_RECORDS]; /* whose; of a record that is used */
    uint8_t records[SHELF_RECORDS][TM_HEADER + TM_PAGE];
    _Atomic uint64_t demoted, tidied, refused;
};
static struct shelf *shelf; /* location n + 1 is record n */

static inline int shelf_fetch(struct tm_ctx *ctx, uint32_t client)
{
    struct tm_window *w = &ctx->window;
    (void)client;
    for (uint32_t i = 0; i < w->nwanted && i < 4; i++) {
        if (w->wanted[i] > SHELF_RECORDS)
            return TM_CORRUPT;
        memcpy(w->bytes + i * 4128, shelf->records[w->wanted[i] - 1], TM_HEADER + TM_PAGE);
        w->held[w->nheld++] = (struct tm_held){w->wanted[i], i * 4128, TM_HEADER + TM_PAGE};
    }
    return TM_OK;
}

static inline void shelf_make(void)
{
    shelf = shared_memory(sizeof *shelf);
    lock_init(&shelf->writer);
}

static inline bool shelf_lock(void)
{
    return lock_try_life(&shelf->writer) != LIFE_TAKEN;
}

/* Of a client's records keep what slots name, and spoil the rest; false if somebody still reads them. The writer's lock is held. */
static inline bool shelf_tidy(struct tm_segment *seg, uint32_t id, unsigned timeout_ms)
{
    static _Thread_local uint64_t live[SHELF_RECORDS];
    uint8_t keep[SHELF_RECORDS] = {0};
    struct tm_ctx *ctx = ctx_get(seg);
    uint64_t n = tm_live(ctx, id, live, SHELF_RECORDS);
    for (uint64_t i = 0; i < n && i < SHELF_RECORDS; i++)
        if (live[i] && live[i] <= SHELF_RECORDS)
            keep[live[i] - 1] = 1;
    if (!tier_grace(ctx, id, timeout_ms))
        return false;
    for (uint32_t i = 0; i < SHELF_RECORDS; i++)
        if (!keep[i] && atomic_load(&shelf->used[i]) && shelf->client[i] == id) {
            memset(shelf->records[i], 0xa5, sizeof shelf->records[i]);
            atomic_store(&shelf->used[i], 0);
        }
    atomic_fetch_add(&shelf->tidied, 1);
    return true;
}

/* Demote up to `most` pages of a client, from `*hand` on; how many went. The writer's lock is held. */
static inline int64_t shelf_demote(struct tm_segment *seg, uint32_t id, uint32_t serial, uint32_t most, uint64_t *hand)
{
    enum { MOST = 64 };
    static _Thread_local uint8_t buffer[MOST * 4128];
    struct tm_candidate pages[MOST];
    uint64_t locations[MOST];
    struct tm_ctx *ctx = ctx_get(seg);
    if (!atomic_load(&seg->clients[id].tiered))
        client_set_tiered(ctx, id, serial, true);
    int64_t n = tm_collect(ctx, id, serial, atomic_load(&seg->clients[id].tier_epoch), true, hand, buffer, sizeof buffer, pages, most < MOST ? most : MOST);
    uint32_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        while (at < SHELF_RECORDS && atomic_load(&shelf->used[at]))
            at++;
        if (at == SHELF_RECORDS) {
            atomic_fetch_add(&shelf->refused, 1);
            return 0;
        }
        memcpy(shelf->records[at], buffer + pages[i].at, pages[i].length);
        shelf->client[at] = id;
        atomic_store(&shelf->used[at], 1);
        locations[i] = at + 1;
    }
    KP(110);
    int64_t done = n > 0 ? tm_demote(ctx, id, serial, pages, locations, (uint32_t)n) : 0;
    atomic_fetch_add(&shelf->demoted, (uint64_t)(done > 0 ? done : 0));
    return done;
}

#endif
