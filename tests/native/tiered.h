/* Pages of the client "test" on the shelf (`shelf.h`): what the tests of tiers have actors do, and look at. */
#ifndef TIERED_H
#define TIERED_H

#include "scenarios.h"
#include "shelf.h"

static inline void ready(struct tm_segment *seg)
{
    seg->fetch = shelf_fetch;
}

static inline int64_t demote_all(struct world *w, struct actor *a)
{
    uint64_t hand = 0;
    uint32_t id, serial;
    (void)a;
    ready(w->seg);
    client_open(ctx_get(w->seg), "test", false, &id, &serial);
    return shelf_demote(w->seg, id, serial, 64, &hand);
}

static inline int64_t get_one(struct world *w, struct actor *a)
{
    ready(w->seg);
    return tm_get(&w->pool, oid, 1, a->page, 1);
}

static inline struct tm_device device_of(struct world *w)
{
    struct tm_device d = {.pool = w->pool, .size = UINT64_C(1) << 30};
    return d;
}

static inline int64_t write_part(struct world *w, struct actor *a)
{
    static const uint8_t bytes[4] = "part";
    struct tm_device d = device_of(w);
    (void)a;
    ready(w->seg);
    uint64_t done = 0;
    return dev_write(&d, bytes, TM_PAGE + 100, sizeof bytes, &done);
}

static inline bool has_part(struct world *w, uint64_t version)
{
    uint8_t page[TM_PAGE], want[TM_PAGE];
    page_make(want, 5001, version * 2654435761u);
    memcpy(want + 100, "part", 4);
    return tm_get(&w->pool, oid, 1, page, 1) == 1 && memcmp(page, want, TM_PAGE) == 0;
}

static inline uint64_t location_in(const struct tm_handle *pool, uint32_t index)
{
    struct cursor cur = {0};
    const uint64_t id[3] = {0};
    cursor_find(pool->seg, pool->pool, id, index, &cur);
    uint64_t word = cur.slots ? atomic_load(&cur.slots[index - cur.first]) : 0;
    return slot_type(word) == SLOT_TIER ? word & SLOT_VALUE : 0;
}

static inline uint64_t location_of(struct world *w, uint32_t index) { return location_in(&w->pool, index); }

/* What the pool's client has left in its tier is forgotten; false if somebody still reads. */
static inline bool tidy_of(const struct tm_handle *pool, unsigned timeout_ms)
{
    bool done = shelf_lock() && shelf_tidy(pool->seg, pool->pool / TM_CLIENT_POOLS, timeout_ms);
    lock_drop(&shelf->writer);
    return done;
}

static inline bool tidy(struct world *w, unsigned timeout_ms) { return tidy_of(&w->pool, timeout_ms); }

static inline void client_of_test(struct world *w, uint32_t *id, uint32_t *serial)
{
    client_open(ctx_get(w->seg), "test", false, id, serial);
}

/* Somebody has fetched the page. Everything goes and comes again, in the same places, with the same generations; what was
 * fetched is out of date. */
static inline void everything_again(struct world *w, operation fetching)
{
    put(&w->pool, 1, 1);
    demote_all(w, NULL);
    uint64_t location = location_of(w, 1);
    pid_t a = start(0, fetching, 102, 0);
    at_point(0);
    tm_flush_object(&w->pool, oid);
    object_reap_empty(ctx_get(w->seg), 10);
    tidy(w, 50);
    put(&w->pool, 1, 2);
    demote_all(w, NULL);
    if (MUTANT(12))
        expect(location_of(w, 1) == location, "the scenario did not come about");
    finish(0, a);
}

#endif
