/* Pages that come back from a tier while there is plenty of memory, beside others and with whoever brings them killed.
 *
 *   prefetch PATH [scenario] */
#include "tiered.h"

/* Pages that come back; `why` is what ended it. */
static int64_t prefetch(struct world *w, bool near, unsigned keep, uint32_t most, int *why)
{
    uint64_t hand = 0;
    int64_t sum = 0, n = 0;
    uint32_t id, serial;
    client_of_test(w, &id, &serial);
    do {
        n = tm_prefetch(ctx_get(w->seg), id, serial, near, keep, &hand, most, why);
        sum += n;
    } while (n >= 0 && hand && *why == TM_OK);
    return n < 0 ? n : sum;
}

static int64_t prefetch_all(struct world *w, struct actor *a)
{
    int why;
    (void)a;
    ready(w->seg);
    return prefetch(w, false, 4, 1000, &why);
}

/* Stopped at each of its steps while the page is put, flushed or read: the put and the flush win. */
static void prefetch_meets_others(struct world *w)
{
    static const uint32_t points[] = {100, 101, 102, 44, 45, 40, 41, 42, 47, 43};
    for (uint32_t i = 0; i < sizeof points / sizeof *points; i++)
        for (unsigned other = 0; other < 4; other++) {
            bool swapped = points[i] == 41 || points[i] == 42 || points[i] == 47 || points[i] == 43;
            put(&w->pool, 1, 1);
            demote_all(w, NULL);
            expect(location_of(w, 1), "nothing was demoted");
            pid_t a = start(0, prefetch_all, points[i], 0);
            at_point(0);
            if (other == 0)
                put(&w->pool, 1, 2);
            else if (other == 1)
                expect(tm_flush(&w->pool, oid, 1, 1) == 1, "stopped at %u: there is no page to flush", points[i]);
            else if (other == 2)
                expect(holds(&w->pool, 1, 1), "stopped at %u: the page is lost", points[i]);
            else
                expect(write_part(w, NULL) == TM_OK && has_part(w, 1), "stopped at %u: a part is lost", points[i]);
            finish(0, a);
            expect(actors[0].result == (swapped || other == 2), "stopped at %u it brought back %lld", points[i],
                   (long long)actors[0].result);
            if (other == 0)
                expect(holds(&w->pool, 1, 2), "stopped at %u: the put is lost", points[i]);
            else if (other == 1)
                expect(!holds(&w->pool, 1, 1), "stopped at %u: a page that was flushed came again", points[i]);
            else
                expect(other == 2 ? holds(&w->pool, 1, 1) : has_part(w, 1), "stopped at %u: the page is lost", points[i]);
            check(w);
        }
}

/* It dies at each of its steps: the page is in the tier, or in memory, and its record is not forgotten too early. */
static void prefetcher_dies(struct world *w)
{
    static const uint32_t points[] = {100, 101, 102, 1, 2, 3, 44, 45, 40, 41, 42, 47, 43};
    for (uint32_t i = 0; i < sizeof points / sizeof *points; i++) {
        put(&w->pool, 1, i + 1);
        demote_all(w, NULL);
        pid_t a = start(0, prefetch_all, points[i], 0);
        at_point(0);
        die(a);
        expect(holds(&w->pool, 1, i + 1), "killed at %u: the page is lost", points[i]);
        tm_reap(ctx_get(w->seg));
        expect(holds(&w->pool, 1, i + 1), "killed at %u: the page is lost by the repair", points[i]);
        check(w);
        expect(tidy(w, 1000) && holds(&w->pool, 1, i + 1), "killed at %u: its record was forgotten", points[i]);
        prefetch_all(w, NULL);
        expect(!location_of(w, 1) && holds(&w->pool, 1, i + 1), "killed at %u: another does not bring it back", points[i]);
    }
}

/* A prefetch must not bring it back. */
static void prefetch_and_everything_again(struct world *w)
{
    everything_again(w, prefetch_all);
    expect(holds(&w->pool, 1, 2), "an old page came back");
    check(w);
}

/* Put ephemeral pages that do not compress until seven eighths of the memory are in use: none goes. */
static void fill_up(struct world *w)
{
    uint8_t page[TM_PAGE];
    uint64_t rng = 7;
    for (uint32_t n = 0; atomic_load(&w->seg->super->nused) * 8u < chunk_limit(w->seg, false) * 7u; n++) {
        for (uint32_t i = 0; i < TM_PAGE; i += 8)
            memcpy(page + i, &(uint64_t){next_random(&rng)}, 8);
        tm_put(&w->ephemeral, oid, 10000 + n, page, 1, KEEP_OLD);
    }
}

/* Only into memory that is free, and not into the last of it: nothing is evicted, no cap is reached, no floor given away. */
static void prefetch_spares_others(struct world *w)
{
    uint32_t id, serial, other, other_serial;
    int why;
    struct tm_ctx *ctx = ctx_get(w->seg);
    client_of_test(w, &id, &serial);
    for (uint32_t i = 1; i <= 1000; i++)
        put(&w->pool, i, i);
    for (uint32_t i = 0; i < 20; i++)
        demote_all(w, NULL);
    int64_t there = w->seg->pools[w->pool.pool].tier_pages;
    expect(there > 800, "only %lld pages were demoted", (long long)there);
    fill_up(w);
    uint64_t drains = atomic_load(&w->seg->super->drains), refused = atomic_load(&w->seg->super->no_memory);
    expect(prefetch(w, false, 4, 100, &why) == 0 && why == TM_REFUSED, "pages came although memory is full");
    tm_flush(&w->ephemeral, oid, 10000, 1000000);
    client_set(ctx, id, serial, VALUE_CAP, 1u << 20);
    int64_t came = prefetch(w, false, 4, 100, &why), used = client_bytes(w->seg, id);
    expect(came > 50 && why == TM_REFUSED && used <= 3 << 18 && used > 5 << 17, "%lld bytes of 3/4 MiB came", (long long)used);
    client_set(ctx, id, serial, VALUE_CAP, 0);
    uint32_t limit = chunk_limit(w->seg, false);
    tm_limit(ctx, limit_bytes(w->seg, 120), limit_bytes(w->seg, limit));
    prefetch(w, false, 4, 100, &why);
    expect(atomic_load(&w->seg->super->nused) <= 90, "%u chunks of a limit of 120 are in use",
           atomic_load(&w->seg->super->nused));
    tm_limit(ctx, limit_bytes(w->seg, limit), limit_bytes(w->seg, limit));
    client_open(ctx, "other", true, &other, &other_serial);
    expect(client_set_floor(ctx, other, other_serial, 4u << 20) == TM_OK, "no floor");
    prefetch(w, false, 4, 100, &why);
    expect(chunks_available(w->seg, chunk_limit(w->seg, false)) >= promised_chunks(w->seg, id), "a floor was given away");
    client_set_floor(ctx, other, other_serial, 0);
    prefetch(w, false, 4, 100, &why);
    expect(why == TM_OK && w->seg->pools[w->pool.pool].tier_pages == 0, "not all came in the end: %d", why);
    expect(atomic_load(&w->seg->super->drains) == drains, "something was evicted");
    expect(atomic_load(&w->seg->super->no_memory) == refused, "it counts as a put that found no memory");
    expect(atomic_load(&w->seg->pools[w->pool.pool].counters[C_PREFETCHED]) == (uint64_t)there, "wrong count");
    for (uint32_t i = 1; i <= 1000; i++)
        expect(holds(&w->pool, i, i), "page %u is lost", i);
    check(w);
}

/* What lies beside a page that was read comes, and nothing else; a read during a handoff marks nothing. */
static void prefetch_near_what_was_read(struct world *w)
{
    int why;
    for (uint32_t i = 0; i < 400; i++)
        put(&w->pool, i, i + 1);
    for (uint32_t i = 0; i < 10; i++)
        demote_all(w, NULL);
    expect(prefetch(w, true, 4, 1000, &why) == 0 && why == TM_OK, "pages came that nobody wants");
    expect(holds(&w->pool, 300, 301), "the page is lost");
    int64_t came = prefetch(w, true, 4, 1, &why);
    expect(came > 20 && came <= 64, "%lld came", (long long)came);
    for (uint32_t i = 256; i < 320; i++)
        expect(!location_of(w, i), "page %u did not come", i);
    expect(prefetch(w, true, 4, 1000, &why) == 0, "they came twice");
    check(w);
}

/* As the fetcher of the product does it: a try without an answer is no error yet. */
static int no_answer(struct tm_ctx *ctx, uint32_t client)
{
    (void)client;
    ctx->window.until_ns = 1;
    return TM_OK;
}

/* A tier that does not answer is left alone at once, and a record that is wrong is passed over. */
static void prefetch_from_a_bad_tier(struct world *w)
{
    int why;
    for (uint32_t i = 1; i <= 20; i++)
        put(&w->pool, i, i);
    demote_all(w, NULL);
    int64_t there = w->seg->pools[w->pool.pool].tier_pages;
    w->seg->fetch = no_answer;
    expect(prefetch(w, false, 4, 100, &why) == 0 && why == TM_DOWN, "it came from nowhere");
    expect(!(atomic_load(&ctx_get(w->seg)->rec->fetching) & 1), "its mark is odd");
    expect(tidy(w, 100), "somebody is waited for");
    ready(w->seg);
    uint8_t *record = shelf->records[location_of(w, 5) - 1];
    record[100] ^= 4;
    expect(prefetch(w, false, 4, 100, &why) == there - 1 && why == TM_OK, "one bad record stops the others");
    record[100] ^= 4;
    for (uint32_t i = 1; i <= 20; i++)
        expect(holds(&w->pool, i, i) && (!location_of(w, i) || i == 5), "page %u is lost", i);
    expect(prefetch(w, false, 4, 100, &why) == 1, "the last one does not come");
    check(w);
}

int main(int argc, char **argv)
{
    static const struct scenario all[] = {
        {"prefetch_meets_others", prefetch_meets_others}, {"prefetcher_dies", prefetcher_dies},
        {"prefetch_and_everything_again", prefetch_and_everything_again}, {"prefetch_spares_others", prefetch_spares_others},
        {"prefetch_near_what_was_read", prefetch_near_what_was_read}, {"prefetch_from_a_bad_tier", prefetch_from_a_bad_tier},
    };
    shelf_make();
    prepare = ready;
    return run_scenarios(argc, argv, all, sizeof all / sizeof *all);
}
