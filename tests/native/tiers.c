/* Pages on their way to a tier, and read there, with everybody stopped or killed at the worst moment. `withdrawals` has a tier
 * that is taken away, `prefetch` pages that come back by themselves.
 *
 *   tiers PATH [scenario] */
#include "tiered.h"

static int64_t take_one(struct world *w, struct actor *a)
{
    ready(w->seg);
    return tm_get(&w->taken, oid, 1, a->page, 1);
}

/* There and back: every sort of reader, and what takes the page away. */
static void there_and_back(struct world *w)
{
    uint8_t page[TM_PAGE * 40];
    for (uint32_t i = 1; i <= 40; i++)
        put(&w->pool, i, i);
    int64_t fill = w->seg->pools[w->pool.pool].fill_pages;
    expect(demote_all(w, NULL) == 40 - fill && fill < 10, "not all pages were demoted");
    expect(w->seg->pools[w->pool.pool].bytes == 0, "demoted pages take memory");
    expect(tm_get(&w->pool, oid, 1, page, 40) == 40, "not all pages came back");
    for (uint32_t i = 1; i <= 40; i++)
        expect(is(page + (i - 1) * TM_PAGE, i, i), "page %u is another", i);
    expect(write_part(w, NULL) == TM_OK && has_part(w, 1) && !location_of(w, 1), "a part was not written");
    expect(tm_flush(&w->pool, oid, 2, 10) == 10, "pages in the tier were not flushed");
    put(&w->pool, 12, 99);
    expect(holds(&w->pool, 12, 99) && !holds(&w->pool, 2, 2) && holds(&w->pool, 13, 13), "a page is not what it was");
    check(w);
    expect(tidy(w, 1000), "somebody reads");
    uint32_t used = 0;
    for (uint32_t i = 0; i < SHELF_RECORDS; i++)
        used += atomic_load(&shelf->used[i]);
    expect(used == w->seg->pools[w->pool.pool].tier_pages, "%u records are kept", used);
    expect(holds(&w->pool, 40, 40), "a page that was kept is lost");
    uint64_t hand = 0;
    uint32_t id, serial;
    client_open(ctx_get(w->seg), "test", false, &id, &serial);
    while (tm_promote(ctx_get(w->seg), id, serial, &hand, 7) > 0 && hand)
        ;
    expect(w->seg->pools[w->pool.pool].tier_pages == 0 && holds(&w->pool, 40, 40), "pages were not brought back");
    check(w);
}

/* The record is written; before the swap the page is put anew. The put stays. */
static void put_while_demoted(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, demote_all, 103, 0);
    at_point(0);
    put(&w->pool, 1, 2);
    finish(0, a);
    expect(actors[0].result == 0, "a page that had changed was demoted");
    expect(holds(&w->pool, 1, 2) && !location_of(w, 1), "the put is lost");
    check(w);
}

/* The same, but the whole object goes, and its leaf, slot and block come again with a page like the first: the same
 * words everywhere. Only the block's stamp tells. */
static void leaf_used_again(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, demote_all, 102, 0); /* never reached: it only waits until the end of its operation */
    finish(0, a);
    expect(holds(&w->pool, 1, 1), "the page is lost");
    struct tm_candidate page;
    uint8_t buffer[4128];
    uint64_t hand = 0, location = 7;
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    tm_flush_object(&w->pool, oid);
    object_reap_empty(ctx, 10);
    put(&w->pool, 1, 1);
    client_open(ctx, "test", false, &id, &serial);
    expect(tm_collect(ctx, id, serial, atomic_load(&w->seg->clients[id].tier_epoch), true, &hand, buffer, sizeof buffer, &page, 1) == 1, "nothing collected");
    tm_flush_object(&w->pool, oid);
    object_reap_empty(ctx, 10);
    put(&w->pool, 1, 3);
    struct cursor cur = {0};
    const uint64_t zeros[3] = {0};
    cursor_find(w->seg, w->pool.pool, zeros, 1, &cur);
    page.word = atomic_load(&cur.slots[1 - cur.first]); /* as if all of it had come again */
    page.slot = off(w->seg, &cur.slots[1 - cur.first]) / 8;
    expect(tm_demote(ctx, id, serial, &page, &location, 1) == 0, "a later page was demoted with the record of another");
    expect(holds(&w->pool, 1, 3), "the later page is lost");
    check(w);
}

/* Two batches are under way, and both have the page: the hand went around meanwhile. The first is acknowledged and the page
 * goes; perhaps it comes back, or is put, flushed, or everything is as it was before. Then the second one is acknowledged. */
static void two_batches(struct world *w)
{
    uint8_t buffer[2][4128];
    struct tm_candidate pages[2];
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t id, serial;
    client_open(ctx, "test", false, &id, &serial);
    client_set_tiered(ctx, id, serial, true);
    for (unsigned between = 0; between < 5; between++) {
        put(&w->pool, 1, 1);
        uint64_t locations[2];
        for (unsigned i = 0; i < 2; i++) {
            uint64_t hand = 0;
            uint32_t epoch = atomic_load(&w->seg->clients[id].tier_epoch), at = 0;
            expect(tm_collect(ctx, id, serial, epoch, true, &hand, buffer[i], sizeof buffer[i], &pages[i], 1) == 1, "nothing collected");
            while (atomic_load(&shelf->used[at]))
                at++;
            memcpy(shelf->records[at], buffer[i], pages[i].length);
            shelf->client[at] = id;
            atomic_store(&shelf->used[at], 1);
            locations[i] = at + 1;
        }
        expect(tm_demote(ctx, id, serial, &pages[0], &locations[0], 1) == 1 && location_of(w, 1) == locations[0], "the page did not go");
        uint64_t back = 0;
        uint32_t version = between == 2 || between == 4 ? 2 : 1;
        if (between == 1)
            expect(tm_promote(ctx, id, serial, &back, 64) == 1, "it did not come back");
        else if (between == 2)
            put(&w->pool, 1, 2);
        else if (between == 3)
            tm_flush(&w->pool, oid, 1, 1);
        else if (between == 4) { /* another tier's page by now */
            put(&w->pool, 1, 2);
            client_set_tiered(ctx, id, serial, false);
            client_set_tiered(ctx, id, serial, true);
        }
        expect(tm_demote(ctx, id, serial, &pages[1], &locations[1], 1) == 0, "it went twice (%u)", between);
        expect(location_of(w, 1) == (between ? 0 : locations[0]), "its slot names something else (%u)", between);
        expect(between == 3 ? !holds(&w->pool, 1, 1) : holds(&w->pool, 1, version), "the page is lost, or came again (%u)", between);
        check(w);
        expect(tidy(w, 1000) && !atomic_load(&shelf->used[locations[1] - 1]), "the second record is kept");
        expect(between == 3 || holds(&w->pool, 1, version), "the page's record was forgotten (%u)", between);
    }
}

/* The demoter dies at each of its steps: the page is in memory, or in the tier, and nothing is leaked. */
static void demoter_dies(struct world *w)
{
    static const uint32_t points[] = {103, 40, 41, 42, 5, 6, 43, 104};
    for (uint32_t i = 0; i < sizeof points / sizeof *points; i++) {
        put(&w->pool, 1, i + 1);
        pid_t a = start(0, demote_all, points[i], 0);
        at_point(0);
        die(a);
        expect(holds(&w->pool, 1, i + 1), "killed at %u: the page is lost", points[i]);
        tm_reap(ctx_get(w->seg));
        expect(shelf_lock(), "the dead still demotes");
        lock_drop(&shelf->writer);
        expect(holds(&w->pool, 1, i + 1), "killed at %u: the page is lost by the repair", points[i]);
        check(w);
        expect(tidy(w, 1000) && holds(&w->pool, 1, i + 1), "killed at %u: its record was forgotten", points[i]);
    }
}

/* A reader has read the record when the page is put anew: it must return one of the two, whole. */
static void reader_and_put(struct world *w)
{
    for (uint32_t point = 100; point <= 102; point++) {
        put(&w->pool, 1, 1);
        demote_all(w, NULL);
        pid_t a = start(0, get_one, point, 0);
        at_point(0);
        put(&w->pool, 1, 2);
        finish(0, a);
        expect(actors[0].result == 1 && is(actors[0].page, 1, 2), "stopped at %u it returned an old page, or none", point);
        check(w);
    }
}

/* Nothing is used again while somebody may read it; who dies while he reads delays nobody. */
static void grace_for_readers(struct world *w)
{
    put(&w->pool, 1, 1);
    demote_all(w, NULL);
    uint64_t location = location_of(w, 1);
    pid_t a = start(0, get_one, 101, 0);
    at_point(0);
    tm_flush(&w->pool, oid, 1, 1);
    expect(!tidy(w, 50), "a record was forgotten under its reader's hands");
    expect(atomic_load(&shelf->used[location - 1]), "its room was free");
    die(a);
    expect(tidy(w, 2000), "the dead reader is waited for");
    expect(!atomic_load(&shelf->used[location - 1]), "its room was not free");
    check(w);
}

/* The pool of a second client, which is made if it is not there yet. */
static struct tm_handle pool_of_other(struct tm_segment *seg)
{
    struct tm_handle pool = {.seg = seg};
    uint32_t id, serial;
    client_open(ctx_get(seg), "other", true, &id, &serial);
    pool.pool = id * TM_CLIENT_POOLS;
    pool.serial = atomic_load(&seg->pools[pool.pool].serial);
    if (atomic_load(&seg->pools[pool.pool].state) != LIVE)
        pool_new(ctx_get(seg), id, serial, &(struct pool_wish){.persistent = true, .id = 0}, &pool.pool, &pool.serial);
    return pool;
}

/* A thread that reads of both clients' tiers, of "test" last, or first. */
static int64_t get_of_both(struct world *w, struct actor *a, bool test_last)
{
    struct tm_handle other = pool_of_other(w->seg);
    ready(w->seg);
    return tm_get(test_last ? &other : &w->pool, oid, 1, a->page, 1) + tm_get(test_last ? &w->pool : &other, oid, 1, a->page, 1);
}

static int64_t get_of_test_last(struct world *w, struct actor *a) { return get_of_both(w, a, true); }

static int64_t get_of_other_last(struct world *w, struct actor *a) { return get_of_both(w, a, false); }

/* A read that hangs in one client's tier, by a thread that has read of another one's: only its own client's waits. */
static void clients_apart(struct world *w)
{
    struct tm_handle other = pool_of_other(w->seg);
    for (unsigned turn = 0; turn < 4; turn++) {
        struct tm_handle held = turn % 2 ? other : w->pool, at_once = turn % 2 ? w->pool : other;
        uint64_t hand = 0, its_place, place_at_once;
        uint32_t id = other.pool / TM_CLIENT_POOLS;
        put(&w->pool, 1, 1);
        put(&other, 1, 3);
        demote_all(w, NULL);
        expect(shelf_demote(w->seg, id, atomic_load(&w->seg->clients[id].serial), 64, &hand) == 1, "nothing was demoted");
        its_place = location_in(&held, 1);
        place_at_once = location_in(&at_once, 1);
        pid_t a = start(0, turn % 2 ? get_of_other_last : get_of_test_last, 101, 1);
        at_point(0);
        expect(!tidy_of(&held, 0) && tidy_of(&at_once, 0), "not the right one is waited for, without anything to be forgotten");
        tm_flush(&w->pool, oid, 1, 1);
        tm_flush(&other, oid, 1, 1);
        expect(tidy_of(&at_once, 0) && !atomic_load(&shelf->used[place_at_once - 1]), "another client's reader is waited for");
        expect(!tidy_of(&held, 50) && atomic_load(&shelf->used[its_place - 1]), "a record was forgotten under its reader's hands");
        put(&at_once, 1, 4);
        hand = 0;
        id = at_once.pool / TM_CLIENT_POOLS;
        shelf_demote(w->seg, id, atomic_load(&w->seg->clients[id].serial), 64, &hand);
        expect(location_in(&at_once, 1) == place_at_once && holds(&at_once, 1, 4), "its room was not used again");
        if (turn < 2)
            finish(0, a);
        else
            die(a);
        expect(turn >= 2 || actors[0].result == 1, "it read %lld pages, not one and a miss", (long long)actors[0].result);
        expect(tidy_of(&held, 2000) && !atomic_load(&shelf->used[its_place - 1]), "who is done is waited for");
        check(w);
    }
}

/* A write of a part must not write it back. */
static void part_and_everything_again(struct world *w)
{
    everything_again(w, write_part);
    expect(actors[0].result == TM_OK && has_part(w, 2), "a part was written to an old page");
    check(w);
}

/* An exclusive get of a page in the tier takes it out once. */
static void take_from_tier(struct world *w)
{
    put(&w->taken, 1, 1);
    demote_all(w, NULL);
    pid_t a = start(0, take_one, 102, 0), b = start(1, take_one, 102, 0);
    at_point(0);
    at_point(1);
    finish(0, a);
    finish(1, b);
    expect(actors[0].result + actors[1].result == 1, "the page was taken %lld times",
           (long long)(actors[0].result + actors[1].result));
    check(w);
}

/* A record that is not what it should be is never returned: a flipped bit, another page's, an older version's, another
 * segment's. */
static void wrong_records(struct world *w)
{
    uint8_t page[TM_PAGE], old[TM_HEADER + TM_PAGE];
    put(&w->pool, 1, 1);
    put(&w->pool, 2, 1);
    demote_all(w, NULL);
    uint8_t *first = shelf->records[location_of(w, 1) - 1], *second = shelf->records[location_of(w, 2) - 1];
    memcpy(old, first, sizeof old);
    for (uint32_t bit = 0; bit < 8 * 40; bit += 7) {
        first[bit / 8] ^= (uint8_t)(1 << bit % 8);
        expect(tm_get(&w->pool, oid, 1, page, 1) == TM_CORRUPT, "bit %u flipped and not found", bit);
        first[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    expect(holds(&w->pool, 1, 1), "the page is lost");
    memcpy(first, second, sizeof old);
    expect(tm_get(&w->pool, oid, 1, page, 1) == TM_CORRUPT, "another page's record was believed");
    memcpy(first, old, sizeof old);
    put(&w->pool, 1, 1);
    put(&w->pool, 1, 2);
    demote_all(w, NULL);
    memcpy(shelf->records[location_of(w, 1) - 1], old, sizeof old);
    expect(tm_get(&w->pool, oid, 1, page, 1) == TM_CORRUPT, "an older version was believed");
    put(&w->pool, 1, 3);
    demote_all(w, NULL);
    w->seg->super->nonce ^= 4;
    expect(tm_get(&w->pool, oid, 1, page, 1) == TM_CORRUPT, "a record of another segment was believed");
    w->seg->super->nonce ^= 4;
    expect(holds(&w->pool, 1, 3) && holds(&w->pool, 2, 1), "a page is lost");
    w->seg->fetch = NULL;
    expect(tm_get(&w->pool, oid, 1, page, 1) == TM_DOWN, "without a tier it came");
    ready(w->seg);
    expect(holds(&w->pool, 1, 3), "it did not come again");
    check(w);
}

/* The pool is destroyed under a thread that fetches and lives on: its mark is even when it is done, and its next fetch
 * is one that others wait for. */
static int64_t get_and_mark(struct world *w, struct actor *a)
{
    int64_t rc = get_one(w, a);
    return atomic_load(&ctx_get(w->seg)->rec->fetching) & 1 ? 1000 + rc : rc;
}

static void pool_destroyed_under_a_reader(struct world *w)
{
    for (uint32_t point = 101; point <= 102; point++) {
        open_world(w);
        put(&w->pool, 1, 1);
        demote_all(w, NULL);
        expect(location_of(w, 1), "nothing was demoted");
        pid_t a = start(0, get_and_mark, point, 0);
        at_point(0);
        pool_destroy(ctx_get(w->seg), w->pool.pool, w->pool.serial);
        finish(0, a);
        expect(actors[0].result == TM_NOPOOL, "stopped at %u it returned %lld (above 900: its mark is odd)", point,
               (long long)actors[0].result);
        expect(tidy(w, 100), "somebody is waited for");
        check(w);
    }
}

/* Bytes of a page where a leaf was, that look like the slot of a page that was used: they must stay as they are. */
static void bytes_like_a_slot(struct world *w)
{
    struct cursor cur = {0};
    const uint64_t id[3] = {0};
    uint8_t buffer[4128];
    struct tm_candidate page;
    uint64_t hand = 0;
    uint32_t client, serial;
    client_of_test(w, &client, &serial);
    client_set_tiered(ctx_get(w->seg), client, serial, true);
    put(&w->pool, 1, 1);
    cursor_find(w->seg, w->pool.pool, id, 1, &cur);
    uint64_t word = atomic_load(&cur.slots[1 - cur.first]);
    slot_t *elsewhere = &cur.slots[2 - cur.first];
    uint64_t alike = word | SLOT_FREQ, was = atomic_exchange(elsewhere, alike);
    uint32_t epoch = atomic_load(&w->seg->clients[client].tier_epoch);
    tm_collect(ctx_get(w->seg), client, serial, epoch, false, &hand, buffer, sizeof buffer, &page, 1);
    expect(atomic_exchange(elsewhere, was) == alike, "bytes that are no slot were changed");
    expect(holds(&w->pool, 1, 1), "the page is lost");
    check(w);
}

/* ---- Back while there is plenty ------------------------------------------------------------------------------ */

/* A slot that was damaged so that its record would touch no block at all. */
static void no_blocks(struct world *w)
{
    static struct tm_window window;
    struct tm_spill spill = {.fd = -1};
    (void)w;
    for (uint32_t n = 1; n <= 2; n++) {
        window.nwanted = n;
        window.nheld = 0;
        window.wanted[0] = window.wanted[1] = 65;
        expect(spill_fetch(&spill, &window) == TM_CORRUPT && window.nheld == 0, "a record without blocks was read");
    }
}

int main(int argc, char **argv)
{
    static const struct scenario all[] = {
        {"there_and_back", there_and_back}, {"put_while_demoted", put_while_demoted}, {"leaf_used_again", leaf_used_again},
        {"two_batches", two_batches}, {"demoter_dies", demoter_dies}, {"reader_and_put", reader_and_put},
        {"grace_for_readers", grace_for_readers}, {"clients_apart", clients_apart},
        {"part_and_everything_again", part_and_everything_again}, {"take_from_tier", take_from_tier}, {"wrong_records", wrong_records},
        {"pool_destroyed_under_a_reader", pool_destroyed_under_a_reader}, {"bytes_like_a_slot", bytes_like_a_slot},
        {"no_blocks", no_blocks},
    };
    shelf_make();
    prepare = ready;
    return run_scenarios(argc, argv, all, sizeof all / sizeof *all);
}
