/* Deterministic interleavings of the pass that packs cold neighbours together with whatever else happens to those pages: a
 * page must never become another one's or an old one, no pack may go while a slot names it, and what nobody needs is freed.
 *
 *   packs PATH [scenario] */
#include "scenarios.h"
#include "sizes.h"
#include "tiered.h"

enum { PAGES = 64 };

/* A page of few different letters, much of it as its neighbours'. */
static void version_page(uint8_t *page, uint32_t index, uint64_t version)
{
    uint64_t seed = mix(index / 8 * 7 + version), own = mix(index * 1000 + version);
    for (unsigned i = 0; i < TM_PAGE; i++)
        page[i] = (uint8_t)("etaoinsh"[next_random(i % 512 < 300 ? &seed : &own) % 5]);
    memcpy(page, &own, sizeof own);
}

#include "versions.h"

static int64_t condense(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_PERSISTENT | CONDENSE_ALL, &spent_ns, NULL);
}
static int64_t visit(struct world *w)
{
    uint64_t spent_ns;
    return (int64_t)tm_condense(ctx_get(w->seg), 0, UINT64_MAX, CONDENSE_PERSISTENT, &spent_ns, NULL);
}
static int64_t pack(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_pack(ctx_get(w->seg), 0, UINT64_MAX, true, &spent_ns);
}
static int64_t unpack(struct world *w, struct actor *a)
{
    uint64_t spent_ns;
    (void)a;
    return (int64_t)tm_unpack(ctx_get(w->seg), 0, UINT64_MAX, &spent_ns);
}
static int64_t gather(struct world *w, struct actor *a)
{
    (void)a;
    return (int64_t)tm_compact(ctx_get(w->seg), 1, UINT64_MAX / 2);
}
static int64_t flush_first(struct world *w, struct actor *a) { (void)a; return tm_flush(&w->pool, oid, 0, 1); }
static int64_t get_first(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 0, a->page, 1); }
static int64_t get_second(struct world *w, struct actor *a) { return tm_get(&w->pool, oid, 1, a->page, 1); }
static int64_t get_both(struct world *w, struct actor *a)
{
    uint8_t page[TM_PAGE];
    tm_get(&w->pool, oid, 1, page, 1);
    kill_point(99);
    return tm_get(&w->pool, oid, 0, a->page, 1);
}
static int64_t take_first(struct world *w, struct actor *a) { return tm_get(&w->taken, oid, 0, a->page, 1); }
static int64_t put_first(struct world *w, struct actor *a) { (void)a; return put_version(&w->pool, 0, 2); }

static uint32_t client_of(struct world *w) { return w->pool.pool / TM_CLIENT_POOLS; }
static struct tm_pool *packs(struct world *w) { return &w->seg->pools[packs_of(w->pool.pool)]; }
static int64_t packed(struct world *w) { return atomic_load(&w->seg->pools[w->pool.pool].packed_pages); }
static int64_t used(struct world *w) { return atomic_load(&w->seg->clients[client_of(w)].used_bytes); }

static void fill(struct world *w)
{
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
}

static void pack_all(struct world *w)
{
    fill(w);
    pack(w, NULL);
    expect(packed(w) == PAGES, "the scenario did not come about: %lld pages are packed", (long long)packed(w));
}

/* So we begin with the same places as it did. */
static void pack_all_by_another(struct world *w)
{
    fill(w);
    finish(0, start(0, pack, 0, 0));
    expect(packed(w) == PAGES, "the scenario did not come about");
}

static void all_but_first_are_intact(struct world *w)
{
    for (uint32_t i = 1; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

static void nothing_is_left(struct world *w)
{
    tm_flush_object(&w->pool, oid);
    unpack(w, NULL);
    expect(packs(w)->pages == 0 && packs(w)->bytes == 0, "%lld packs are left", (long long)packs(w)->pages);
    expect(used(w) == 0, "%lld bytes are left", (long long)used(w));
    check(w);
}

/* What it saves, as it is counted; ranges, part of them, and pages of pools whose gets take them out. */
static void memory_is_saved(struct world *w)
{
    static uint8_t pages[PAGES * TM_PAGE];
    uint8_t page[TM_PAGE];
    struct tm_condensed found = {0};
    uint64_t spent_ns;
    put_version(&w->taken, 0, 1);
    put_version(&w->taken, 1, 1);
    fill(w);
    int64_t before = used(w);
    pack(w, NULL);
    int64_t after = used(w);
    expect(packed(w) == PAGES && packs(w)->pages == PAGES / TM_GROUP + 1, "%lld pages in %lld packs", (long long)packed(w),
           (long long)packs(w)->pages);
    expect(before - after == atomic_load(&w->seg->super->packed_bytes) && after < before * 9 / 10, "saved %lld of %lld, says %lld",
           (long long)(before - after), (long long)before, (long long)atomic_load(&w->seg->super->packed_bytes));
    tm_condense(ctx_get(w->seg), 0, UINT64_MAX, 0, &spent_ns, &found);
    expect(found.packed == PAGES + 2 && found.packed_saved == before - after, "now %llu, saved %lld",
           (unsigned long long)found.packed, (long long)found.packed_saved);
    pack(w, NULL);
    expect(used(w) == after && packs(w)->pages == PAGES / TM_GROUP + 1, "packed twice");
    expect(tm_get(&w->taken, oid, 0, page, 1) == 1 && has(page, 0, 1), "the page that was taken");
    expect(tm_get(&w->taken, oid, 0, page, 1) == 0, "a page that was taken is still there");
    expect(tm_get(&w->taken, oid, 1, page, 1) == 1 && has(page, 1, 1), "its neighbour");
    expect(tm_get(&w->pool, oid, 0, pages, PAGES) == PAGES, "a range");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(has(pages + (size_t)i * TM_PAGE, i, 1), "page %u of a range", i);
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

/* Neither of clients that want no compression, while one is handed over, when it is off, nor for nothing. */
static void only_where_it_pays(struct world *w)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t client = client_of(w), serial = atomic_load(&w->seg->clients[client].serial);
    fill(w);
    atomic_store(&w->seg->super->pack, 0);
    pack(w, NULL);
    expect(packed(w) == 0, "it is off");
    atomic_store(&w->seg->super->pack, 1);
    client_set(ctx, client, serial, VALUE_CODEC, CODEC_NONE);
    pack(w, NULL);
    expect(packed(w) == 0, "pages of a client that wants none compressed");
    client_set(ctx, client, serial, VALUE_CODEC, CODEC_LZ4);
    client_set(ctx, client, serial, VALUE_CAP, (uint64_t)used(w) + TM_STRIDE_RAW);
    pack(w, NULL);
    expect(packed(w) == 0, "at a cap, where a put might be refused for it");
    client_set(ctx, client, serial, VALUE_CAP, 0);
    atomic_store(&w->seg->clients[client].phase, PHASE_COPYING);
    pack(w, NULL);
    expect(packed(w) == 0, "in a handoff");
    atomic_store(&w->seg->clients[client].phase, PHASE_NONE);
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&w->taken, i, 400); /* of which four have no room in a block, and two save nothing */
    condense(w, NULL);
    pack(w, NULL);
    expect(packed(w) == PAGES, "%lld pages are packed", (long long)packed(w));
    expect(atomic_load(&w->seg->pools[w->taken.pool].packed_pages) == 0, "packed for nothing");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(holds_sized(&w->taken, i, 400), "page %u", i);
    tm_flush_object(&w->taken, oid);
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

/* Pages that are used stay out of packs, or leave them. */
static void what_is_used_is_not_packed(struct world *w)
{
    uint8_t page[TM_PAGE];
    uint64_t spent_ns;
    fill(w);
    visit(w);
    tm_get(&w->pool, oid, 5, page, 1);
    tm_pack(ctx_get(w->seg), 0, UINT64_MAX, false, &spent_ns);
    expect(packed(w) > PAGES / 2 && packed(w) < PAGES, "%lld pages are packed beside one that is warm", (long long)packed(w));
    visit(w);
    visit(w);
    tm_pack(ctx_get(w->seg), 0, UINT64_MAX, false, &spent_ns);
    expect(packed(w) >= PAGES - 2, "%lld pages are packed once all are cold", (long long)packed(w));
    for (unsigned times = 0; times < 2; times++) {
        visit(w);
        for (uint32_t i = 0; i < PAGES; i += TM_GROUP)
            tm_get(&w->pool, oid, i, page, 1);
    }
    expect(packed(w) >= PAGES - 2, "they leave too soon");
    visit(w);
    expect(packed(w) < PAGES / 4, "%lld pages are packed that are read all the time", (long long)packed(w));
    tm_pack(ctx_get(w->seg), 0, UINT64_MAX, false, &spent_ns);
    expect(packed(w) < PAGES / 4, "they are packed again at once");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

static void change_before(struct world *w, uint32_t point, uint32_t skip, bool flush)
{
    uint8_t page[TM_PAGE];
    fill(w);
    pid_t pass = start(0, pack, point, skip);
    at_point(0);
    if (flush)
        tm_flush(&w->pool, oid, 0, 1);
    else
        put_version(&w->pool, 0, 2);
    finish(0, pass);
    expect(flush ? tm_get(&w->pool, oid, 0, page, 1) == 0 : keeps(&w->pool, 0, 2), "page 0 is not what it was made");
    expect(packed(w) > PAGES / 2, "the scenario did not come about");
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

static void put_before_pack(struct world *w) { change_before(w, 128, 0, false); }
static void flush_before_pack(struct world *w) { change_before(w, 128, 0, true); }
static void put_before_join(struct world *w) { change_before(w, 121, 0, false); }
static void flush_before_join(struct world *w) { change_before(w, 121, 0, true); }
static void put_between_joins(struct world *w) { change_before(w, 122, 1, false); }
static void flush_between_joins(struct world *w) { change_before(w, 122, 1, true); }

static void death(struct world *w, operation op, uint32_t point, uint32_t skip)
{
    pid_t pass = start(0, op, point, skip);
    at_point(0);
    die(pass);
    tm_reap(ctx_get(w->seg));
    check(w);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1) || (op == unpack && i % TM_GROUP > 1), "page %u is lost", i);
    unpack(w, NULL);
    condense(w, NULL);
    pack(w, NULL);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1) || (op == unpack && i % TM_GROUP > 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

static void death_with_lock(struct world *w) { fill(w); death(w, pack, 127, 1); }
static void death_before_join(struct world *w) { fill(w); death(w, pack, 121, 1); }
static void death_between_joins(struct world *w) { fill(w); death(w, pack, 122, 5); }
static void death_in_swap(struct world *w) { fill(w); death(w, pack, 41, 7); }

/* Half of each pack's pages go. */
static void halve(struct world *w)
{
    pack_all(w);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % TM_GROUP > 1)
            tm_flush(&w->pool, oid, i, 1);
}

static void death_in_unpacking(struct world *w) { halve(w); death(w, unpack, 123, 3); }
static void death_after_unpacking(struct world *w) { halve(w); death(w, unpack, 124, 3); }
static void death_before_removal(struct world *w) { halve(w); death(w, unpack, 125, 3); }
static void death_after_removal(struct world *w) { halve(w); death(w, unpack, 126, 3); }

/* Packs that half of their pages have left give their memory back; those that all have, too. */
static void halves_are_taken_apart(struct world *w)
{
    halve(w);
    int64_t before = used(w);
    unpack(w, NULL);
    expect(packs(w)->pages == 0 && packed(w) == 0, "%lld packs are left", (long long)packs(w)->pages);
    expect(used(w) < before, "%lld bytes of %lld", (long long)used(w), (long long)before);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(i % TM_GROUP > 1 || keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    pack(w, NULL);
    expect(packed(w) == PAGES / 2, "neighbours are not packed again");
    tm_flush(&w->pool, oid, 0, 2);
    unpack(w, NULL);
    expect(packed(w) == PAGES / 2 - 2 && packs(w)->pages == PAGES / TM_GROUP - 1, "an empty pack stays");
    check(w);
    nothing_is_left(w);
}

/* The last page that leaves a pack takes it along, however it goes. */
static void last_pages_take_their_packs(struct world *w)
{
    pack_all(w);
    int64_t there = packs(w)->pages;
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % TM_GROUP)
            tm_flush(&w->pool, oid, i, 1);
    expect(packs(w)->pages == there && atomic_load(&w->seg->super->pack_losses) == PAGES - there, "%lld packs, %lld lost",
           (long long)packs(w)->pages, (long long)atomic_load(&w->seg->super->pack_losses));
    tm_flush(&w->pool, oid, 0, PAGES / 2);
    expect(packs(w)->pages == there / 2, "%lld packs are left", (long long)packs(w)->pages);
    for (uint32_t i = PAGES / 2; i < PAGES; i += TM_GROUP)
        put_version(&w->pool, i, 2);
    expect(packs(w)->pages == 0 && packs(w)->bytes == 0, "%lld packs are left", (long long)packs(w)->pages);
    expect(atomic_load(&w->seg->super->pack_losses) == 0, "%lld pages are lost",
           (long long)atomic_load(&w->seg->super->pack_losses));
    for (uint32_t i = PAGES / 2; i < PAGES; i += TM_GROUP)
        expect(keeps(&w->pool, i, 2), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Whoever flushes the last page of a pack is about to remove that, when another one comes by, does it, and another pack of the
 * same pages comes to its place. */
static void another_pack_comes_after_the_last(struct world *w)
{
    pack_all_by_another(w);
    for (uint32_t i = 1; i < PAGES; i++)
        tm_flush(&w->pool, oid, i, 1);
    pid_t pid = start(0, flush_first, 130, 0);
    at_point(0);
    unpack(w, NULL);
    expect(packs(w)->pages == 0, "the scenario did not come about");
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 2);
    condense(w, NULL);
    finish(1, start(1, pack, 0, 0));
    expect(packed(w) == PAGES, "the scenario did not come about");
    finish(0, pid);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 2), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Two threads flush the last two pages of a pack: at the latest the next look at it removes it, once. */
static void two_last_pages(struct world *w)
{
    pack_all(w);
    for (uint32_t i = 1; i < TM_GROUP - 1; i++)
        tm_flush(&w->pool, oid, i, 1);
    pid_t pid = start(0, flush_first, 41, 0);
    at_point(0);
    tm_flush(&w->pool, oid, TM_GROUP - 1, 1);
    expect(packs(w)->pages == PAGES / TM_GROUP - 1, "the pack is still there");
    finish(0, pid);
    expect(packs(w)->pages == PAGES / TM_GROUP - 1, "%lld packs are left", (long long)packs(w)->pages);
    for (uint32_t i = TM_GROUP; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Many packs, of which most are left by all of their pages, others by all but one. */
enum { MANY = 1024 };
static bool stays(uint32_t i) { return i % (2 * TM_GROUP) == 1; }
static void wear(struct world *w)
{
    for (uint32_t i = 0; i < MANY; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
    pack(w, NULL);
    expect(packed(w) > MANY * 9 / 10, "the scenario did not come about");
    for (uint32_t i = 0; i < MANY; i++)
        if (!stays(i))
            tm_flush(&w->pool, oid, i, 1);
}

static void worn_are_intact(struct world *w, uint64_t version)
{
    for (uint32_t i = 0; i < MANY; i++)
        expect(!stays(i) || keeps(&w->pool, i, version), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Who moves pages together takes worn packs apart, and so gets the memory of both. */
static void worn_packs_are_not_moved(struct world *w)
{
    wear(w);
    int64_t before = used(w);
    expect(gather(w, NULL) > 0, "no chunk came free");
    expect(packs(w)->pages < 16 && used(w) < before * 6 / 10, "%lld packs, %lld bytes of %lld are left", (long long)packs(w)->pages,
           (long long)used(w), (long long)before);
    worn_are_intact(w, 1);
}

/* Pages are put while their packs are taken apart in chunks that are emptied, and packed again: new packs, in the places of
 * the old ones. */
static void packed_again_while_gathered(struct world *w)
{
    wear(w);
    pid_t pass = start(0, gather, 129, 2);
    at_point(0);
    for (uint32_t i = 0; i < MANY; i++)
        if (stays(i) || i % 8 < 4)
            put_version(&w->pool, i, 2);
    unpack(w, NULL);
    condense(w, NULL);
    pack(w, NULL);
    finish(0, pass);
    worn_are_intact(w, 2);
}

static void put_while_gathered(struct world *w)
{
    wear(w);
    pid_t pass = start(0, gather, 123, 2);
    at_point(0);
    for (uint32_t i = 0; i < MANY; i++)
        if (stays(i))
            put_version(&w->pool, i, 2);
    finish(0, pass);
    worn_are_intact(w, 2);
}

static void death_while_gathering(struct world *w)
{
    static const uint32_t points[] = {123, 124, 125, 126, 41, 53};
    for (unsigned i = 0; i < sizeof points / sizeof *points; i++) {
        wear(w);
        pid_t pass = start(0, gather, points[i], 2);
        at_point(0);
        die(pass);
        tm_reap(ctx_get(w->seg));
        worn_are_intact(w, 1);
    }
}

static void death_of_who_flushes_the_last(struct world *w)
{
    static const uint32_t points[] = {130, 125, 126};
    for (unsigned i = 0; i < sizeof points / sizeof *points; i++) {
        pack_all(w);
        for (uint32_t j = 1; j < TM_GROUP; j++)
            tm_flush(&w->pool, oid, j, 1);
        pid_t pid = start(0, flush_first, points[i], 0);
        at_point(0);
        die(pid);
        tm_reap(ctx_get(w->seg));
        unpack(w, NULL);
        expect(packs(w)->pages == PAGES / TM_GROUP - 1, "%lld packs are left", (long long)packs(w)->pages);
        for (uint32_t j = TM_GROUP; j < PAGES; j++)
            expect(keeps(&w->pool, j, 1), "page %u is lost", j);
        check(w);
        nothing_is_left(w);
    }
}

/* A page is put, or flushed, while its pack is taken apart. */
static void put_while_unpacking(struct world *w)
{
    halve(w);
    pid_t pass = start(0, unpack, 123, 0);
    at_point(0);
    put_version(&w->pool, 0, 2);
    finish(0, pass);
    expect(keeps(&w->pool, 0, 2), "the new version is lost");
    for (uint32_t i = 1; i < PAGES; i++)
        expect(i % TM_GROUP > 1 || keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* While a pack is taken apart its pages are put, and packed again: another pack has its place, and its pages name that. */
static void another_pack_comes_there(struct world *w)
{
    pack_all_by_another(w);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % TM_GROUP > 1)
            tm_flush(&w->pool, oid, i, 1);
    pid_t pass = start(0, unpack, 129, 0);
    at_point(0);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % TM_GROUP < 2)
            put_version(&w->pool, i, 2);
    unpack(w, NULL);
    condense(w, NULL);
    pack(w, NULL);
    expect(packed(w) == PAGES / 2, "the scenario did not come about");
    finish(0, pass);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(i % TM_GROUP > 1 || keeps(&w->pool, i, 2), "page %u is not what was put last", i);
    check(w);
    nothing_is_left(w);
}

/* A pack has been made, and no slot names it yet; somebody who removes such packs comes by. */
static void removal_while_packing(struct world *w)
{
    fill(w);
    pid_t pass = start(0, pack, 121, 0);
    at_point(0);
    unpack(w, NULL);
    for (uint32_t i = 200; i < 260; i++)
        put(&w->taken, i, 1);
    finish(0, pass);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    tm_flush_object(&w->taken, oid);
    nothing_is_left(w);
}

/* Readers of packs whose pages are put, whose memory is used again, and which are made anew in the same place. */
static void reader(struct world *w, operation op, uint32_t point)
{
    pack_all(w);
    pid_t pid = start(0, op, point, 0);
    at_point(0);
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 2);
    unpack(w, NULL);
    expect(packs(w)->pages == 0, "the scenario did not come about");
    condense(w, NULL);
    finish(1, start(1, pack, 0, 0)); /* begins with the first place */
    expect(packed(w) == PAGES, "the scenario did not come about");
    finish(0, pid);
    uint32_t index = op == get_second;
    expect(actors[0].result == 1 && has(actors[0].page, index, 2), "the reader got another page");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 2), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

static void reader_before_pack(struct world *w) { reader(w, get_first, 120); }
static void reader_in_pack(struct world *w) { reader(w, get_second, 46); }
/* The same of one that has read a neighbour, and so has the old pack's pages. */
static void reader_with_old_pages(struct world *w) { reader(w, get_both, 99); }

/* A pack is moved while a reader is in it, and its old block used for others. */
static void reader_of_moved_pack(struct world *w)
{
    pack_all(w);
    pid_t pid = start(0, get_first, 46, 0);
    at_point(0);
    for (uint32_t i = TM_GROUP; i < PAGES; i++)
        tm_flush(&w->pool, oid, i, 1);
    unpack(w, NULL);
    struct tm_ctx *ctx = ctx_get(w->seg);
    for (uint64_t number = 1; number * 8 < w->seg->size; number++) { /* as moving pages together does */
        if (slot_pool(w->seg, number) != (int)packs_of(w->pool.pool))
            continue;
        slot_t *slot = at(w->seg, number * 8);
        uint64_t word = atomic_load(slot);
        if (slot_type(word) != SLOT_BLOCK)
            continue;
        op_begin(ctx);
        ctx->client = ctx->payer = client_of(w);
        const struct tm_block *from = block_at(w->seg, word & SLOT_VALUE);
        uint64_t header = atomic_load(&from->word);
        uint64_t block = block_alloc(ctx, w->seg->chunks[chunk_of(w->seg, (word & SLOT_VALUE) * 16)].bin, ALLOC_NORMAL);
        block_write(block_at(w->seg, block), number, block_form(header), block_length(header), (const uint8_t *)(from + 1));
        expect(slot_replace(ctx, packs_of(w->pool.pool), slot, &word, slot_next(word, SLOT_BLOCK, block)), "it is not moved");
        memset(block_at(w->seg, word & SLOT_VALUE) + 1, 0x5a, 1000);
        op_end(ctx);
        break;
    }
    finish(0, pid);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 1), "the reader got %lld", (long long)actors[0].result);
    expect(keeps(&w->pool, 1, 1), "page 1 is lost");
    check(w);
    nothing_is_left(w);
}

/* A page that a get is to take out is put meanwhile: it must take the new one. */
static void taker(struct world *w)
{
    put_version(&w->taken, 0, 1);
    put_version(&w->taken, 1, 1);
    pack_all(w);
    pid_t pid = start(0, take_first, 46, 0);
    at_point(0);
    put_version(&w->taken, 0, 2);
    finish(0, pid);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 2), "not the page that was there");
    expect(!keeps(&w->taken, 0, 1) && !keeps(&w->taken, 0, 2), "the page is still there");
    expect(keeps(&w->taken, 1, 1), "its neighbour is lost");
    tm_flush_object(&w->taken, oid);
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

/* A put has read a slot and written its block; the page is packed; the put swaps. */
static void packed_before_puts_swap(struct world *w)
{
    fill(w);
    pid_t putter = start(0, put_first, 40, 0);
    at_point(0);
    pack(w, NULL);
    finish(0, putter);
    expect(actors[0].result == 1 && keeps(&w->pool, 0, 2), "the new version is lost");
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

enum { LATER = 10000 };

/* Packs of MANY pages, and no memory for more. */
static uint32_t fill_beside_packs(struct world *w)
{
    for (uint32_t i = 0; i < MANY; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
    pack(w, NULL);
    expect(packed(w) > MANY * 3 / 4, "the scenario did not come about");
    uint32_t n = put_until_refused(&w->taken, LATER, RAW);
    expect(n > 0 && put_sized(&w->taken, LATER + n, RAW) != 1, "there is memory");
    return n;
}

/* Packs that most of their pages have left give way to a put that finds no memory. */
static void packs_give_way(struct world *w)
{
    uint32_t n = fill_beside_packs(w);
    for (uint32_t i = 0; i < MANY; i++)
        if (i % TM_GROUP)
            tm_flush(&w->pool, oid, i, 1);
    uint32_t more = put_until_refused(&w->taken, LATER + n, RAW);
    expect(more * 4096 > MANY / TM_GROUP * 400, "only %u pages of what was freed", more);
    for (uint32_t i = 0; i < MANY; i += TM_GROUP)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    for (uint32_t i = 0; i < n + more; i++)
        expect(holds_sized(&w->taken, LATER + i, RAW), "page %u is lost", LATER + i);
    check(w);
}

/* A put finds no memory while somebody has the lock that it needs to remove packs which no slot names: it is refused, but
 * not those that come later. */
static void packs_give_way_later(struct world *w)
{
    for (uint32_t i = 0; i < MANY; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
    pid_t pass = start(0, pack, 121, MANY / TM_GROUP - 1);
    at_point(0);
    uint32_t n = put_until_refused(&w->taken, LATER, RAW);
    tm_flush(&w->pool, oid, 0, MANY - TM_GROUP);
    expect(packs(w)->pages == MANY / TM_GROUP && put_sized(&w->taken, LATER + n, RAW) != 1, "the scenario did not come about");
    finish(0, pass);
    uint32_t more = put_until_refused(&w->taken, LATER + n, RAW);
    expect(more * 4096 > MANY * 400, "only %u pages of what was freed", more);
    for (uint32_t i = MANY - TM_GROUP; i < MANY; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

/* All pages are flushed while somebody has the lock, so that their packs stay. */
static void flush_while_locked(struct world *w)
{
    expect(twins_lock(w->seg), "the lock is not free");
    tm_flush(&w->pool, oid, 0, MANY);
    twins_unlock(w->seg);
    expect(packs(w)->pages == MANY / TM_GROUP, "the scenario did not come about");
}

/* The manager has begun to take packs apart and is at others when a put finds no memory. */
static void packs_give_way_in_a_round(struct world *w)
{
    uint64_t spent_ns;
    uint32_t n = fill_beside_packs(w);
    flush_while_locked(w);
    tm_unpack(ctx_get(w->seg), 0, 0, &spent_ns);
    expect(put_sized(&w->taken, LATER + n, RAW) == 1, "a put is refused beside packs that nobody needs");
    check(w);
}

/* What a put lacks is the index for its page. */
static void packs_give_way_to_index(struct world *w)
{
    enum { STEP = 512 }; /* each page in a leaf of its own, and none of them needs a block */
    uint32_t far = 1 << 20, before, after;
    fill_beside_packs(w);
    for (before = 0; put_sized(&w->taken, far, 0) == 1; before++)
        far += STEP;
    flush_while_locked(w);
    for (after = 0; put_sized(&w->taken, far, 0) == 1; after++)
        far += STEP;
    expect(after > 16, "only %u leaves after %u", after, before);
    check(w);
}

/* And what it lacks is room below its client's cap. */
static void packs_give_way_at_cap(struct world *w)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t client = client_of(w), serial = atomic_load(&w->seg->clients[client].serial), n = 0;
    for (uint32_t i = 0; i < MANY; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
    pack(w, NULL);
    for (uint32_t i = 0; i < MANY; i++)
        if (i % TM_GROUP)
            tm_flush(&w->pool, oid, i, 1);
    expect(packed(w) > MANY / TM_GROUP * 3 / 4, "the scenario did not come about");
    client_set(ctx, client, serial, VALUE_CAP, (uint64_t)used(w));
    while (n < 30 && put_sized(&w->taken, (n + 1) << 20, RAW) == 1) /* in a leaf of its own */
        n++;
    expect(n == 30, "only %u pages", n);
    expect(used(w) <= (int64_t)atomic_load(&w->seg->clients[client].cap_bytes), "beyond the cap");
    for (uint32_t i = 0; i < MANY; i += TM_GROUP)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

/* Room for the index of packs is made of pages that a mount has, which are compressed on that occasion: none of them, and
 * nothing of them, may get into the pack. */
static void others_give_way_to_index(struct world *w)
{
    enum { HALF = RAW / 2 };
    fill(w);
    uint32_t n = 0;
    while (chunks_available(w->seg, chunk_limit(w->seg, false)))
        put_sized(&w->ephemeral, n++, HALF);
    uint64_t before = atomic_load(&w->seg->super->squeezed);
    pack(w, NULL);
    expect(packed(w) == PAGES && atomic_load(&w->seg->super->squeezed) > before, "the scenario did not come about");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t page[TM_PAGE];
        expect(tm_get(&w->ephemeral, oid, i, page, 1) == 0 || holds_sized(&w->ephemeral, i, HALF), "page %u of the others", i);
    }
    check(w);
    tm_flush_object(&w->ephemeral, oid);
    nothing_is_left(w);
}

/* A client goes while its pages are packed, and while one is read. */
static void client_goes(struct world *w)
{
    uint32_t client = client_of(w);
    pack_all(w);
    for (uint32_t i = PAGES; i < 2 * PAGES; i++)
        put_version(&w->pool, i, 1);
    condense(w, NULL);
    pid_t pid = start(0, get_first, 46, 0);
    at_point(0);
    pid_t pass = start(1, pack, 121, 0);
    at_point(1);
    atomic_store(&actors[0].go, 1);
    atomic_store(&actors[1].go, 1);
    client_destroy(ctx_get(w->seg), client, atomic_load(&w->seg->clients[client].serial));
    finish(0, pid);
    finish(1, pass);
    expect(actors[0].result == 1 && has(actors[0].page, 0, 1), "the reader got %lld", (long long)actors[0].result);
    tm_reap(ctx_get(w->seg));
    expect(packs(w)->state == FREE, "the packs are still there");
    check(w);
}

/* Pages leave for another place as the pages that they are, and what has changed is told. */
static void packed_pages_are_exported(struct world *w)
{
    static uint8_t records[1 << 20];
    struct tm_handle to = {.seg = w->seg};
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    pack_all(w);
    client_open(ctx, "other", true, &id, &serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .id = -1}, &to.pool, &to.serial);
    uint32_t own = atomic_load(&w->seg->clients[client_of(w)].serial);
    expect(client_handoff(ctx, client_of(w), own, PHASE_COPYING) == TM_OK, "the handoff");
    for (unsigned times = 0; times < 2; times++) {
        struct tm_export e = {.pool = w->pool, .changes = true};
        int64_t n, all = 0;
        while ((n = tm_export_fill(&e, records, sizeof records)) > 0) {
            int64_t some = tm_import(&to, records, (size_t)n);
            expect(some > 0, "the import says %lld", (long long)some);
            all += some;
        }
        expect(n == 0 && all == (times ? 2 : PAGES), "%lld pages are told, and %lld", (long long)all, (long long)n);
        put_version(&w->pool, 0, 2);
        tm_flush(&w->pool, oid, 1, 1);
    }
    client_handoff(ctx, client_of(w), own, PHASE_NONE);
    for (uint32_t i = 2; i < PAGES; i++)
        expect(keeps(&to, i, 1), "page %u of the copy is lost", i);
    expect(keeps(&to, 0, 2), "page 0 of the copy is lost");
    tm_flush(&w->pool, oid, 0, 1);
    for (uint32_t i = 2; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
}

static int64_t tiered(struct world *w) { return atomic_load(&w->seg->pools[w->pool.pool].tier_pages); }

/* Packed pages go to a tier as the pages that they are, one by one, and never the pack. */
static void packed_pages_are_demoted(struct world *w)
{
    pack_all(w);
    demote_all(w, NULL);
    expect(tiered(w) == PAGES && packed(w) == 0, "%lld pages went", (long long)tiered(w));
    expect(packs(w)->tier_pages == 0, "packs went, too");
    unpack(w, NULL);
    expect(packs(w)->pages == 0, "packs of pages that went stay");
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    uint64_t hand = 0;
    uint32_t id, serial;
    client_of_test(w, &id, &serial);
    expect(tm_promote(ctx_get(w->seg), id, serial, &hand, 2 * PAGES) == PAGES, "they do not come back");
    pack(w, NULL);
    expect(packed(w) == PAGES, "they are not packed again");
    uint64_t spent_ns;
    struct tm_condensed found = {0};
    tm_condense(ctx_get(w->seg), 0, UINT64_MAX, 0, &spent_ns, &found);
    expect(found.packed == PAGES && found.packed_saved > 0, "%llu are counted", (unsigned long long)found.packed);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    check(w);
    nothing_is_left(w);
}

/* Only those that nobody has used since the last look. */
static void used_pages_stay(struct world *w)
{
    static uint8_t buffer[PAGES * 4128];
    struct tm_candidate pages[PAGES];
    uint8_t page[TM_PAGE];
    uint64_t hand = 0;
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(w->seg);
    client_of_test(w, &id, &serial);
    client_set_tiered(ctx, id, serial, true);
    pack_all(w);
    uint32_t epoch = atomic_load(&w->seg->clients[id].tier_epoch);
    expect(tm_collect(ctx, id, serial, epoch, false, &hand, buffer, sizeof buffer, pages, PAGES) == 0, "just put");
    expect(tm_get(&w->pool, oid, 5, page, 1) == 1, "page 5");
    hand = 0;
    int64_t n = tm_collect(ctx, id, serial, epoch, false, &hand, buffer, sizeof buffer, pages, PAGES);
    expect(n == PAGES - 1, "%lld pages are cold", (long long)n);
    all_but_first_are_intact(w);
    nothing_is_left(w);
}

/* Records of packed pages are on their way to the tier when everything goes, and comes again as it was: the same slots name
 * the same packs, which have other pages. */
static void packed_again_before_demotion(struct world *w)
{
    static const uint8_t other[TM_OID] = {1}; /* whose leaves and packs keep their chunks */
    uint8_t page[TM_PAGE];
    demote_all(w, NULL); /* now it has a tier */
    for (uint32_t i = 0; i < PAGES; i++) {
        version_page(page, i, 3);
        tm_put(&w->pool, other, i, page, 1, KEEP_OLD);
    }
    fill(w);
    finish(1, start(1, pack, 0, 0));
    pid_t pid = start(0, demote_all, 110, 0);
    at_point(0);
    tm_flush_object(&w->pool, oid);
    unpack(w, NULL);
    object_reap_empty(ctx_get(w->seg), 10);
    for (uint32_t i = 0; i < PAGES; i++)
        put_version(&w->pool, i, 2);
    condense(w, NULL);
    finish(1, start(1, pack, 0, 0));
    expect(packed(w) == 2 * PAGES, "the scenario did not come about");
    finish(0, pid);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 2), "page %u is an old one", i);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(tm_get(&w->pool, other, i, page, 1) == 1 && has(page, i, 3), "page %u of the other object", i);
    check(w);
    tm_flush_object(&w->pool, other);
    nothing_is_left(w);
}

static void allow(struct tm_segment *seg)
{
    ready(seg);
    atomic_store(&seg->super->pack, 1);
}

static slot_t *slot_at(struct world *w, uint32_t index)
{
    static const uint64_t id[3];
    struct cursor cur = {0};
    cursor_find(w->seg, w->pool.pool, id, index, &cur);
    return &cur.slots[index - cur.first];
}

/* A bit of a pack, or of a slot that names one, is flipped: its pages are errors, and never other pages. */
static void flipped_bits(struct world *w)
{
    uint8_t page[TM_PAGE];
    pack_all(w);
    slot_t *slot = slot_at(w, 1), *holder = at(w->seg, (atomic_load(slot) & SLOT_VALUE) * 8);
    struct tm_block *b = block_at(w->seg, atomic_load(holder) & SLOT_VALUE);
    uint32_t size = TM_HEADER + block_length(atomic_load(&b->word)), errors = 0, n = 0;
    for (uint32_t i = 0; i < size; i += i < 48 ? 1 : 97)
        for (uint32_t bit = 0; bit < 8; bit++, n++) {
            ((uint8_t *)b)[i] ^= (uint8_t)(1u << bit);
            int64_t got = tm_get(&w->pool, oid, 1, page, 1);
            expect(got == TM_CORRUPT || (got == 1 && has(page, 1, 1)), "byte %u: %lld", i, (long long)got);
            errors += got == TM_CORRUPT;
            ((uint8_t *)b)[i] ^= (uint8_t)(1u << bit);
        }
    expect(errors > n / 3, "%u errors of %u", errors, n);
    for (uint32_t bit = 0; bit < 36; bit++) {
        uint64_t word = atomic_load(slot);
        atomic_store(slot, word ^ UINT64_C(1) << bit);
        int64_t got = tm_get(&w->pool, oid, 1, page, 1);
        expect(got == TM_CORRUPT, "bit %u of the slot: %lld", bit, (long long)got);
        atomic_store(slot, word);
    }
    for (uint32_t i = 0; i < PAGES; i++)
        expect(keeps(&w->pool, i, 1), "page %u is lost", i);
    ((uint8_t *)b)[200] ^= 1;
    ctx_get(w->seg)->unpacked.pack = 0;
    expect(tm_get(&w->pool, oid, 1, page, 1) == TM_CORRUPT && tm_get(&w->pool, oid, 5, page, 1) == 1, "a damaged pack");
    unpack(w, NULL);
    expect(tm_flush(&w->pool, oid, 0, 2) == 2, "it cannot be flushed");
    unpack(w, NULL);
    expect(tm_get(&w->pool, oid, 2, page, 1) == TM_CORRUPT, "its last pages");
    nothing_is_left(w);
}

static const struct scenario scenarios[] = {
    {"flipped_bits", flipped_bits},
    {"packed_pages_are_demoted", packed_pages_are_demoted},
    {"used_pages_stay", used_pages_stay},
    {"packed_again_before_demotion", packed_again_before_demotion},
    {"memory_is_saved", memory_is_saved},
    {"only_where_it_pays", only_where_it_pays},
    {"what_is_used_is_not_packed", what_is_used_is_not_packed},
    {"put_before_pack", put_before_pack},
    {"flush_before_pack", flush_before_pack},
    {"put_before_join", put_before_join},
    {"flush_before_join", flush_before_join},
    {"put_between_joins", put_between_joins},
    {"flush_between_joins", flush_between_joins},
    {"death_with_lock", death_with_lock},
    {"death_before_join", death_before_join},
    {"death_between_joins", death_between_joins},
    {"death_in_swap", death_in_swap},
    {"death_in_unpacking", death_in_unpacking},
    {"death_after_unpacking", death_after_unpacking},
    {"death_before_removal", death_before_removal},
    {"death_after_removal", death_after_removal},
    {"halves_are_taken_apart", halves_are_taken_apart},
    {"put_while_unpacking", put_while_unpacking},
    {"another_pack_comes_there", another_pack_comes_there},
    {"last_pages_take_their_packs", last_pages_take_their_packs},
    {"another_pack_comes_after_the_last", another_pack_comes_after_the_last},
    {"two_last_pages", two_last_pages},
    {"worn_packs_are_not_moved", worn_packs_are_not_moved},
    {"packed_again_while_gathered", packed_again_while_gathered},
    {"put_while_gathered", put_while_gathered},
    {"death_while_gathering", death_while_gathering},
    {"death_of_who_flushes_the_last", death_of_who_flushes_the_last},
    {"removal_while_packing", removal_while_packing},
    {"reader_before_pack", reader_before_pack},
    {"reader_in_pack", reader_in_pack},
    {"reader_with_old_pages", reader_with_old_pages},
    {"reader_of_moved_pack", reader_of_moved_pack},
    {"taker", taker},
    {"packed_before_puts_swap", packed_before_puts_swap},
    {"packs_give_way", packs_give_way},
    {"packs_give_way_later", packs_give_way_later},
    {"packs_give_way_in_a_round", packs_give_way_in_a_round},
    {"packs_give_way_to_index", packs_give_way_to_index},
    {"packs_give_way_at_cap", packs_give_way_at_cap},
    {"others_give_way_to_index", others_give_way_to_index},
    {"client_goes", client_goes},
    {"packed_pages_are_exported", packed_pages_are_exported},
};

int main(int argc, char **argv)
{
    shelf_make();
    prepare = allow;
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
