/* Deterministic interleavings of the pass that keeps equal pages once with whatever else happens to those pages: a page
 * must never become another one's, and no original may go while a slot names it. Checksums have six bits here, so that
 * pages which differ are compared all the time.
 *
 *   twins PATH [scenario] */
#include "scenarios.h"
#include "sizes.h"

enum { PAGES = 60, KINDS = 20 };

/* Page `index` is as page index % KINDS, of which there are three. */
static void version_page(uint8_t *page, uint32_t index, uint64_t version)
{
    page_make(page, 5000 + index % KINDS, version * 2654435761u);
}

#include "versions.h"

static int64_t dedup(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_dedup(ctx_get(w->seg), 0, UINT64_MAX, true, &spent_ns);
}
static int64_t dedup_twice(struct world *w, struct actor *a) { return dedup(w, a) + dedup(w, a); }
static int64_t get_first(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 0, a->page, 1); }
static int64_t take_first(struct world *w, struct actor *a) { return tm_get(&w->taken, oid, 0, a->page, 1); }
static int64_t put_first(struct world *w, struct actor *a) { (void)a; return put_version(&w->pool, 0, 2); }
static int64_t condense(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_PERSISTENT | CONDENSE_ALL, &spent_ns, NULL);
}

static uint32_t client_of(struct world *w) { return w->pool.pool / TM_CLIENT_POOLS; }
static struct tm_pool *originals(struct world *w) { return &w->seg->pools[originals_of(w->seg, w->pool.pool)]; }
static int64_t twins(struct world *w) { return atomic_load(&w->seg->pools[w->pool.pool].twin_pages); }

static void allow(struct world *w) { atomic_store(&w->seg->clients[client_of(w)].dedup, 1); }

static void fill(struct world *w)
{
    allow(w);
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 1);
}

/* Fill, and keep all equal pages once. */
static void pair_all(struct world *w)
{
    fill(w);
    dedup(w, NULL);
    expect(twins(w) > PAGES / 2, "the scenario did not come about: %lld twins", (long long)twins(w));
}

static void rest_is_intact(struct world *w)
{
    for (uint32_t i = 1; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    expect(twins(w) > PAGES / 3, "the scenario did not come about: %lld twins", (long long)twins(w));
    check(w);
}

/* All pages go: the next look leaves no original. */
static void nothing_is_left(struct world *w)
{
    tm_flush_object(&w->pool, oid);
    dedup(w, NULL);
    expect(originals(w)->pages == 0 && originals(w)->bytes == 0, "%lld originals are left", (long long)originals(w)->pages);
    check(w);
}

/* What it saves; and that pages of pools with exclusive gets take part. */
static void memory_is_saved(struct world *w)
{
    uint8_t page[TM_PAGE];
    fill(w);
    put_version(&w->taken, 0, 1);
    int64_t before = atomic_load(&w->seg->clients[client_of(w)].used_bytes);
    dedup_twice(w, NULL);
    int64_t after = atomic_load(&w->seg->clients[client_of(w)].used_bytes);
    expect(twins(w) == originals(w)->pages * (PAGES / KINDS), "%lld twins of %lld originals", (long long)twins(w),
           (long long)originals(w)->pages);
    expect(atomic_load(&w->seg->pools[w->taken.pool].twin_pages) == 1, "exclusive gets");
    expect(before - after == atomic_load(&w->seg->super->twin_bytes), "saved %lld, says %lld", (long long)(before - after),
           (long long)atomic_load(&w->seg->super->twin_bytes));
    expect(tm_get(&w->taken, oid, 0, page, 1) == 1 && has(page, 0, 1), "the page that was taken");
    expect(tm_get(&w->taken, oid, 0, page, 1) == 0, "a page that was taken is still there");
    rest_is_intact(w);
    nothing_is_left(w);
}

/* Not of clients that do not want it, of other clients, or persistent ones together with ephemeral ones. */
static void only_where_wanted(struct world *w)
{
    fill(w);
    atomic_store(&w->seg->clients[client_of(w)].dedup, 0);
    dedup(w, NULL);
    expect(twins(w) == 0, "equal pages of a client that does not want it are kept once");
    struct tm_handle other = {.seg = w->seg};
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    client_open(ctx, "other", true, &id, &serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .id = -1}, &other.pool, &other.serial);
    for (uint32_t i = 0; i < KINDS; i++) {
        put_version(&other, i, 1);
        put_version(&w->ephemeral, i, 1);
    }
    tm_flush(&w->pool, oid, KINDS, PAGES);
    allow(w);
    atomic_store(&w->seg->clients[id].dedup, 1);
    dedup_twice(w, NULL);
    expect(atomic_load(&w->seg->super->twins) == 0, "a page is kept once for two clients, or for pools of two kinds");
    check(w);
}

static void change_before_join(struct world *w, uint32_t point, bool flush)
{
    uint8_t page[TM_PAGE];
    fill(w);
    pid_t pass = start(0, dedup, point, 0);
    at_point(0);
    if (flush)
        for (uint32_t i = 0; i < PAGES; i += KINDS)
            tm_flush(&w->pool, oid, i, 1);
    else
        for (uint32_t i = 0; i < PAGES; i += KINDS)
            put_version(&w->pool, i, 2 + i);
    finish(0, pass);
    for (uint32_t i = 0; i < PAGES; i += KINDS)
        expect(flush ? tm_get(&w->pool, oid, i, page, 1) == 0 : keeps(&w->pool, i, 2 + i), "page %u", i);
    for (uint32_t i = 1; i < PAGES; i++)
        expect(i % KINDS == 0 || keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

static void put_before_join(struct world *w) { change_before_join(w, 111, false); }
static void put_between_joins(struct world *w) { change_before_join(w, 113, false); }
static void flush_before_join(struct world *w) { change_before_join(w, 110, true); }
static void flush_between_joins(struct world *w) { change_before_join(w, 113, true); }

static void death(struct world *w, uint32_t point)
{
    fill(w);
    pid_t pass = start(0, dedup, point, 7);
    at_point(0);
    die(pass);
    tm_reap(ctx_get(w->seg));
    check(w);
    dedup_twice(w, NULL);
    expect(keeps(&w->pool, 0, 1), "page 0 is lost");
    rest_is_intact(w);
    nothing_is_left(w);
}

static void death_before_join(struct world *w) { death(w, 110); }
static void death_with_lock(struct world *w) { death(w, 111); }
static void death_in_swap(struct world *w) { death(w, 41); }
static void death_after_join(struct world *w) { death(w, 112); }
static void death_between_joins(struct world *w) { death(w, 113); }

/* Half of the twins go, and all of those of half of the originals; whoever removes these dies. */
static void death_in_sweep(struct world *w)
{
    pair_all(w);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % KINDS % 2)
            tm_flush(&w->pool, oid, i, 1);
    pid_t pass = start(0, dedup, 115, 2);
    at_point(0);
    die(pass);
    for (uint32_t i = 0; i < PAGES; i += 2)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    dedup(w, NULL);
    expect(originals(w)->pages == KINDS / 2, "%lld originals are left", (long long)originals(w)->pages);
    for (uint32_t i = 0; i < PAGES; i += 2)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* A pass has made an original, or has compared a page with one; before it makes the page a twin the original goes,
 * because no slot names it, and another page takes its place. */
static void original_goes(struct world *w)
{
    fill(w);
    pid_t pass = start(0, dedup, 110, 0);
    at_point(0);
    atomic_store(&w->seg->clients[client_of(w)].dedup, 0);
    dedup(w, NULL); /* only removes originals */
    expect(originals(w)->pages == 0, "the scenario did not come about");
    atomic_store(&w->seg->clients[client_of(w)].dedup, 1);
    finish(0, pass);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Somebody has looked at all slots, and removes originals; another pass must not make new twins of those. */
static void join_while_sweeping(struct world *w)
{
    pair_all(w);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % KINDS < 5)
            tm_flush(&w->pool, oid, i, 1);
    pid_t sweeper = start(0, dedup, 114, 0);
    at_point(0);
    for (uint32_t i = 0; i < 5; i++)
        put_version(&w->pool, i, 1); /* equal to originals that are about to go */
    dedup(w, NULL);
    finish(0, sweeper);
    for (uint32_t i = 0; i < 5; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    dedup(w, NULL);
    for (uint32_t i = 5; i < KINDS; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    nothing_is_left(w);
}

/* A reader is in the block of an original when all its twins are put, the original goes, and its memory is used. */
static void reader_of_original(struct world *w)
{
    pair_all(w);
    pid_t reader = start(0, get_first, 46, 0);
    at_point(0);
    for (uint32_t i = 0; i < PAGES; i += KINDS)
        put_version(&w->pool, i, 2);
    atomic_store(&w->seg->clients[client_of(w)].dedup, 0);
    dedup(w, NULL);
    expect(originals(w)->pages < KINDS, "the scenario did not come about");
    for (uint32_t i = 200; i < 400; i++)
        put(&w->pool, i, 1);
    finish(0, reader);
    expect(actors[0].result == 1 && (has(actors[0].page, 0, 1) || has(actors[0].page, 0, 2)), "the reader got another page");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, i % KINDS ? 1 : 2), "page %u is lost", i);
    check(w);
}

/* The same, of a page that a get is to take out: it must take the new one. */
static void taker_of_original(struct world *w)
{
    fill(w);
    put_version(&w->taken, 0, 1);
    dedup_twice(w, NULL);
    pid_t taker = start(0, take_first, 46, 0);
    at_point(0);
    put_version(&w->taken, 0, 2);
    finish(0, taker);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 2), "not the page that was there");
    expect(!keeps(&w->taken, 0, 1) && !keeps(&w->taken, 0, 2), "the page is still there");
    expect(keeps(&w->pool, 0, 1), "page 0 is lost");
    rest_is_intact(w);
}

/* A reader is in the block of an original when that is stored in another form. */
static void reader_and_condensing(struct world *w)
{
    pair_all(w);
    pid_t reader = start(0, get_first, 46, 0);
    at_point(0);
    condense(w, NULL);
    for (uint32_t i = 200; i < 400; i++)
        put(&w->pool, i, 1);
    finish(0, reader);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 1), "the reader got another page");
    expect(keeps(&w->pool, 0, 1), "page 0 is lost");
    rest_is_intact(w);
}

/* A put has read a slot and written its block; the page becomes a twin; the put swaps. */
static void joined_before_puts_swap(struct world *w)
{
    fill(w);
    pid_t putter = start(0, put_first, 40, 0);
    at_point(0);
    dedup(w, NULL);
    finish(0, putter);
    expect(actors[0].result == 1 && keeps(&w->pool, 0, 2), "the new version is lost");
    rest_is_intact(w);
    nothing_is_left(w);
}

/* Twins that are all put again need memory for each; the originals that nobody names any more give theirs. */
static void originals_give_way(struct world *w)
{
    uint8_t page[TM_PAGE];
    allow(w);
    for (uint32_t i = 0; i < 2 * RAW_PER_CHUNK * 4; i++) {
        sized_page(page, i / 2, RAW);
        tm_put(&w->pool, oid, i, page, 1, KEEP_OLD);
    }
    dedup_twice(w, NULL);
    expect(originals(w)->pages > RAW_PER_CHUNK * 3, "the scenario did not come about");
    uint32_t first = 10000, n = put_until_refused(&w->pool, first, RAW);
    tm_flush(&w->pool, oid, first, 2 * RAW_PER_CHUNK); /* room for half of what comes now */
    for (uint32_t i = 0; i < 4 * RAW_PER_CHUNK - 2; i++)
        expect(put_sized(&w->pool, i, RAW) == 1, "page %u is refused", i);
    for (uint32_t i = 0; i < 4 * RAW_PER_CHUNK - 2; i++)
        expect(holds_sized(&w->pool, i, RAW), "page %u is lost", i);
    for (uint32_t i = 2 * RAW_PER_CHUNK; i < n; i++)
        expect(holds_sized(&w->pool, first + i, RAW), "page %u is lost", first + i);
    check(w);
}

/* A client goes while its pages are joined, and while one is read through an original. */
static void client_goes(struct world *w)
{
    uint32_t client = client_of(w);
    pair_all(w);
    put_version(&w->pool, PAGES, 1);
    pid_t reader = start(0, get_first, 46, 0);
    at_point(0);
    pid_t pass = start(1, dedup, 111, 0);
    at_point(1);
    atomic_store(&actors[0].go, 1);
    atomic_store(&actors[1].go, 1);
    client_destroy(ctx_get(w->seg), client, atomic_load(&w->seg->clients[client].serial));
    finish(0, reader);
    finish(1, pass);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 1), "the reader got %lld", (long long)actors[0].result);
    tm_reap(ctx_get(w->seg));
    expect(originals(w)->state == FREE, "the originals are still there");
    check(w);
}

/* Twins leave for another place as the pages that they are. */
static void twins_are_exported(struct world *w)
{
    static uint8_t records[1 << 20];
    struct tm_handle to = {.seg = w->seg};
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    pair_all(w);
    client_open(ctx, "other", true, &id, &serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .id = -1}, &to.pool, &to.serial);
    struct tm_export e = {.pool = w->pool};
    for (int64_t n; (n = tm_export_fill(&e, records, sizeof records));)
        if (n < 0 || tm_import(&to, records, (size_t)n) < 0) {
            expect(false, "the export says %lld", (long long)n);
            return;
        }
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&to, i, 1), "page %u of the copy is lost", i);
    rest_is_intact(w);
}

#include "evicted.h"

static const struct scenario scenarios[] = {
    {"memory_is_saved", memory_is_saved},
    {"only_where_wanted", only_where_wanted},
    {"put_before_join", put_before_join},
    {"put_between_joins", put_between_joins},
    {"flush_before_join", flush_before_join},
    {"flush_between_joins", flush_between_joins},
    {"death_before_join", death_before_join},
    {"death_with_lock", death_with_lock},
    {"death_in_swap", death_in_swap},
    {"death_after_join", death_after_join},
    {"death_between_joins", death_between_joins},
    {"death_in_sweep", death_in_sweep},
    {"original_goes", original_goes},
    {"join_while_sweeping", join_while_sweeping},
    {"reader_of_original", reader_of_original},
    {"taker_of_original", taker_of_original},
    {"reader_and_condensing", reader_and_condensing},
    {"joined_before_puts_swap", joined_before_puts_swap},
    {"originals_give_way", originals_give_way},
    {"client_goes", client_goes},
    {"twins_are_exported", twins_are_exported},
    {"ephemeral_memory_is_saved", ephemeral_memory_is_saved},
    {"original_without_trace", original_without_trace},
    {"originals_are_evicted", originals_are_evicted},
    {"place_stays_taken", place_stays_taken},
    {"object_stays", object_stays},
    {"reader_before_original", reader_before_original},
    {"reader_in_evicted", reader_in_evicted},
    {"evicted_before_look", evicted_before_look},
    {"evicted_after_look", evicted_after_look},
    {"death_at_twin", death_at_twin},
    {"death_at_original", death_at_original},
    {"under_pressure", under_pressure},
    {"shared_pages_are_kept_once", shared_pages_are_kept_once},
    {"off_and_on", off_and_on},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
