/* Deterministic interleavings of the background pass that stores cold pages smaller with whatever else happens to those
 * pages and their chunks: it must never bring an old page back, take a new one away, or free what another refers to.
 *
 *   condense PATH [scenario] */
#include "scenarios.h"

#include "sizes.h"

enum { PAGES = 60 };

/* A page of few different letters: zstd makes two thirds of LZ4's of it. */
static void version_page(uint8_t *page, uint32_t index, uint64_t version)
{
    uint64_t seed = mix(index * 1000 + version);
    for (unsigned i = 0; i < TM_PAGE; i++)
        page[i] = (uint8_t)("etaoin"[next_random(&seed) % 6]);
}

#include "versions.h"

static int64_t condense(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_PERSISTENT | CONDENSE_EPHEMERAL | CONDENSE_ALL, &spent_ns, NULL);
}
static int64_t restore(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_PERSISTENT, &spent_ns, NULL);
}
static int64_t get_first(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 0, a->page, 1); }
static int64_t put_first(struct world *w, struct actor *a) { (void)a; return put_version(&w->pool, 0, 2); }

static void fill(struct world *w)
{
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 1);
}

static void rest_is_intact(struct world *w)
{
    for (uint32_t i = 1; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    expect(atomic_load(&w->seg->super->condensed) > PAGES / 2, "the scenario did not come about");
    check(w);
}

static void put_before_swap(struct world *w)
{
    fill(w);
    pid_t pass = start(0, condense, 54, 0);
    at_point(0);
    put_version(&w->pool, 0, 2);
    finish(0, pass);
    expect(keeps(&w->pool, 0, 2), "the new version is lost");
    rest_is_intact(w);
}

static void flush_before_swap(struct world *w)
{
    uint8_t page[TM_PAGE];
    fill(w);
    pid_t pass = start(0, condense, 54, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 0, 1);
    finish(0, pass);
    expect(tm_get(&w->pool, oid, 0, page, 1) == 0, "a flushed page came back");
    rest_is_intact(w);
}

/* A put has read the slot and written its block; the page is condensed; the put swaps. */
static void condensed_before_puts_swap(struct world *w)
{
    struct actor none;
    fill(w);
    pid_t putter = start(0, put_first, 40, 0);
    at_point(0);
    condense(w, &none);
    finish(0, putter);
    expect(actors[0].result == 1 && keeps(&w->pool, 0, 2), "the new version is lost");
    rest_is_intact(w);
}

static void death(struct world *w, uint32_t point)
{
    struct actor none;
    fill(w);
    pid_t pass = start(0, condense, point, 0);
    at_point(0);
    die(pass);
    tm_reap(ctx_get(w->seg));
    expect(keeps(&w->pool, 0, 1), "page 0 is lost");
    check(w);
    condense(w, &none);
    rest_is_intact(w);
}

static void death_before_swap(struct world *w) { death(w, 54); }
static void death_in_swap(struct world *w) { death(w, 41); }
static void death_after_swap(struct world *w) { death(w, 55); }

/* A reader has verified a block; its page is condensed, and the block used for others. */
static void reader_of_old_block(struct world *w)
{
    struct actor none;
    fill(w);
    pid_t reader = start(0, get_first, 46, 0);
    at_point(0);
    condense(w, &none);
    for (uint32_t i = PAGES; i < 3 * PAGES; i++)
        put_version(&w->pool, i, 1);
    finish(0, reader);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 1), "the reader got another page");
    rest_is_intact(w);
}

/* The same of a condensed block, whose page is put again. */
static void reader_of_condensed_block(struct world *w)
{
    struct actor none;
    fill(w);
    condense(w, &none);
    pid_t reader = start(0, get_first, 46, 0);
    at_point(0);
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, i ? 1 : 2);
    for (uint32_t i = PAGES; i < 3 * PAGES; i++)
        put_version(&w->pool, i, 1);
    condense(w, &none);
    finish(0, reader);
    expect(actors[0].result == 1 && (has(actors[0].page, 0, 1) || has(actors[0].page, 0, 2)),
           "the reader got another page");
    rest_is_intact(w);
}

/* Pages that were hit twice are about to be restored when one of them is put. */
static void put_before_restoring_swap(struct world *w)
{
    struct actor none;
    uint8_t page[TM_PAGE];
    fill(w);
    condense(w, &none);
    for (unsigned n = 0; n < 2; n++) {
        if (n)
            restore(w, &none);
        for (uint32_t i = 0; i < PAGES; i++)
            tm_get(&w->pool, oid, i, page, 1);
    }
    pid_t pass = start(0, restore, 54, 0);
    at_point(0);
    put_version(&w->pool, 0, 2);
    finish(0, pass);
    expect(atomic_load(&w->seg->super->restored) > PAGES / 2, "nothing was restored");
    expect(keeps(&w->pool, 0, 2), "the new version is lost");
    rest_is_intact(w);
}

/* So many pages are condensed, and then so hot that the next visit would restore them. */
static void condensed_and_hot(struct world *w, uint32_t n)
{
    struct actor none;
    uint8_t page[TM_PAGE];
    for (uint32_t i = 0; i < n; i++)
        put_version(&w->pool, i, 1);
    condense(w, &none);
    expect(atomic_load(&w->seg->super->condensed) > n / 2, "the scenario did not come about");
    for (unsigned times = 0; times < 2; times++) {
        if (times)
            restore(w, &none);
        for (uint32_t i = 0; i < n; i++)
            tm_get(&w->pool, oid, i, page, 1);
    }
}

/* Hot pages stay as they are when an eighth of the cap would not be left ... */
static void hot_at_cap(struct world *w)
{
    struct actor none;
    uint32_t id, serial;
    client_open(ctx_get(w->seg), "test", false, &id, &serial);
    condensed_and_hot(w, PAGES);
    uint64_t cap = (uint64_t)client_bytes(w->seg, id) * 8 / 7 + 3 * TM_STRIDE_RAW;
    client_set(ctx_get(w->seg), id, serial, VALUE_CAP, cap);
    restore(w, &none);
    uint64_t restored = atomic_load(&w->seg->super->restored);
    expect(restored > 0 && restored < 20, "%llu pages were restored", (unsigned long long)restored);
    expect((uint64_t)client_bytes(w->seg, id) <= cap * 7 / 8, "%lld bytes of a cap of %llu", (long long)client_bytes(w->seg, id),
           (unsigned long long)cap);
    expect(put_version(&w->pool, PAGES, 1) == 1, "a put is refused for it");
    client_set(ctx_get(w->seg), id, serial, VALUE_CAP, 0);
    condensed_and_hot(w, PAGES);
    restore(w, &none);
    expect(atomic_load(&w->seg->super->restored) > restored + PAGES / 2, "they are not restored without a cap");
    rest_is_intact(w);
}

/* ... or of the limit, beside what others were promised. Beside pages that may be evicted they do not. */
static void hot_beside_limit_and_promise(struct world *w)
{
    enum { MANY = 3000 };
    struct actor none;
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t test, test_serial, other, other_serial;
    uint8_t page[TM_PAGE];
    client_open(ctx, "test", false, &test, &test_serial);
    client_open(ctx, "other", true, &other, &other_serial);
    condensed_and_hot(w, MANY);
    uint32_t used = atomic_load(&w->seg->super->nused), limit = used + used / 7 + 8, most = chunk_limit(w->seg, false);
    tm_limit(ctx, limit_bytes(w->seg, limit), limit_bytes(w->seg, limit));
    restore(w, &none);
    used = atomic_load(&w->seg->super->nused);
    expect(used <= limit * 7 / 8 + 4, "%u chunks of a limit of %u are in use", used, limit);
    tm_limit(ctx, limit_bytes(w->seg, most), limit_bytes(w->seg, most));
    condensed_and_hot(w, MANY);
    uint64_t floor = 16u << 20;
    while (client_set_floor(ctx, other, other_serial, floor) != TM_OK)
        floor -= 1u << 16;
    restore(w, &none);
    uint32_t free = chunks_available(w->seg, chunk_limit(w->seg, true)), promised = promised_chunks(w->seg, test);
    expect(free >= promised, "%u chunks are left of %u that were promised", free, promised);
    client_set_floor(ctx, other, other_serial, 0);
    uint64_t restored = atomic_load(&w->seg->super->restored);
    for (uint32_t i = 0; i < MANY; i++) { /* ephemeral pages take all that is free, and give it back */
        sized_page(page, i, RAW);
        tm_put(&w->ephemeral, oid, i, page, 1, KEEP_NOTHING);
    }
    condensed_and_hot(w, PAGES);
    restore(w, &none);
    expect(atomic_load(&w->seg->super->restored) > restored, "nothing is restored beside pages that may be evicted");
    for (uint32_t i = 0; i < MANY; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

/* The pass has begun with a chunk when all of its pages go, and it becomes one of other pages, smaller ones of an
 * ephemeral pool. */
static void chunk_of_others(struct world *w)
{
    uint8_t page[TM_PAGE], small[TM_PAGE];
    fill(w);
    pid_t pass = start(0, condense, 56, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 0, PAGES);
    for (uint32_t i = 0; i < 8 * PAGES; i++) {
        sized_page(small, i, 40);
        tm_put(&w->ephemeral, oid, i, small, 1, KEEP_OLD);
        put_version(&w->pool, PAGES + i, 1);
    }
    finish(0, pass);
    for (uint32_t i = 0; i < 8 * PAGES; i++) {
        sized_page(small, i, 40);
        expect(tm_get(&w->ephemeral, oid, i, page, 1) == 1 && !memcmp(page, small, TM_PAGE), "ephemeral page %u", i);
        expect(keeps(&w->pool, PAGES + i, 1), "persistent page %u", PAGES + i);
    }
    check(w);
}

/* Versions of page 0, or pages, that need a block of the same size as its first one. */
static uint32_t class_of(struct world *w, uint32_t index, uint64_t version)
{
    static uint8_t to[TM_SCRATCH];
    uint8_t page[TM_PAGE];
    version_page(page, index, version);
    return size_class(codec_compress(ctx_get(w->seg), page, to));
}

static uint64_t third;
static int64_t put_third(struct world *w, struct actor *a) { (void)a; return put_version(&w->pool, 0, third); }

/* The pass has seen a page and is slow. The page is put, and its old block is somebody's new one, who is slow, too. The
 * pass notes that block, with the stamp that it has now, and dies before its swap fails: whose is the block? */
static void block_used_again_before_swap(struct world *w)
{
    uint64_t second = 2;
    uint32_t other = PAGES;
    fill(w);
    while (class_of(w, 0, second) != class_of(w, 0, 1))
        second++;
    for (third = second + 1; class_of(w, 0, third) != class_of(w, 0, 1);)
        third++;
    while (class_of(w, other, 1) != class_of(w, 0, 1))
        other++;
    pid_t pass = start(0, condense, 54, 0);
    at_point(0);
    atomic_store(&actors[0].next, 40);
    put_version(&w->pool, 0, second);
    pid_t putter = start(1, put_third, 45, 0);
    at_point(1);
    atomic_store(&actors[0].go, 1);
    while (atomic_load(&actors[0].go))
        nap();
    at_point(0); /* with the stamp of another's block, or at the next page */
    die(pass);
    tm_reap(ctx_get(w->seg));
    finish(1, putter);
    put_version(&w->pool, other, 1);
    expect(actors[1].result == 1 && keeps(&w->pool, 0, third), "the page that was put is lost");
    expect(keeps(&w->pool, other, 1), "the page that was put last is lost");
    check(w);
}

static const struct scenario scenarios[] = {
    {"block_used_again_before_swap", block_used_again_before_swap},
    {"put_before_swap", put_before_swap},
    {"flush_before_swap", flush_before_swap},
    {"condensed_before_puts_swap", condensed_before_puts_swap},
    {"death_before_swap", death_before_swap},
    {"death_in_swap", death_in_swap},
    {"death_after_swap", death_after_swap},
    {"reader_of_old_block", reader_of_old_block},
    {"reader_of_condensed_block", reader_of_condensed_block},
    {"put_before_restoring_swap", put_before_restoring_swap},
    {"chunk_of_others", chunk_of_others},
    {"hot_at_cap", hot_at_cap},
    {"hot_beside_limit_and_promise", hot_beside_limit_and_promise},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
