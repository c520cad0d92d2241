/* Scenarios of twins in ephemeral pools, whose originals may be evicted at any time: then they are misses, and never what took
 * the original's place. For twins.c. */
#ifndef EVICTED_H
#define EVICTED_H

static int64_t get_ephemeral(struct world *w, struct actor *a) { return tm_get(&w->ephemeral, oid, 0, a->page, 1); }

static struct tm_pool *evictable(struct world *w) { return &w->seg->pools[originals_of(w->seg, w->ephemeral.pool)]; }
static int64_t ephemeral_twins(struct world *w) { return atomic_load(&w->seg->pools[w->ephemeral.pool].twin_pages); }

/* The slot of the original of page `index`; NULL: it is no twin. */
static slot_t *original_at(struct world *w, uint32_t index)
{
    static const uint64_t id[3];
    struct cursor cur = {0};
    struct tm_ctx *ctx = ctx_get(w->seg);
    op_begin(ctx);
    cursor_find(w->seg, w->ephemeral.pool, id, index, &cur);
    uint64_t word = cur.slots ? atomic_load(&cur.slots[index - cur.first]) : 0;
    op_end(ctx);
    return slot_type(word) == SLOT_TWIN ? twin_original(w->seg, w->ephemeral.pool, word) : NULL;
}

/* Evict one page as `drain_page` would, without a ghost. */
static void evict_original(struct world *w, slot_t *original)
{
    struct tm_ctx *ctx = ctx_get(w->seg);
    op_begin(ctx);
    slot_flush(ctx, originals_of(w->seg, w->ephemeral.pool), original, SLOT_EMPTY);
    op_end(ctx);
}

/* Of `from` and every third kind behind it, as far as they are twins. */
static void evict_some(struct world *w, uint32_t from)
{
    for (uint32_t i = from; i < KINDS; i += 3) {
        slot_t *original = original_at(w, i);
        if (original)
            evict_original(w, original);
    }
}

static void fill_ephemeral(struct world *w, uint32_t first, uint64_t version)
{
    allow(w);
    for (uint32_t i = first; i < first + PAGES; i++)
        put_version(&w->ephemeral, i, version);
}

static void pair_ephemeral(struct world *w)
{
    fill_ephemeral(w, 0, 1);
    dedup_twice(w, NULL);
    expect(ephemeral_twins(w) > PAGES * 2 / 3 && original_at(w, 0), "the scenario did not come about: %lld twins",
           (long long)ephemeral_twins(w));
}

/* Page `index` is of that version, or a miss. */
static bool right_or_gone(struct world *w, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    return tm_get(&w->ephemeral, oid, index, page, 1) == 0 || has(page, index, version);
}

static void all_right_or_gone(struct world *w)
{
    for (uint32_t i = 0; i < PAGES; i++)
        expect(right_or_gone(w, i, 1), "page %u is another one", i);
    check(w);
}

static void no_original_is_left(struct world *w)
{
    tm_flush_object(&w->ephemeral, oid);
    dedup(w, NULL);
    check(w);
    expect(evictable(w)->pages == 0 && evictable(w)->objects == 0, "%lld originals, %lld objects are left",
           (long long)evictable(w)->pages, (long long)evictable(w)->objects);
}

static void ephemeral_memory_is_saved(struct world *w)
{
    fill_ephemeral(w, 0, 1);
    int64_t before = atomic_load(&w->seg->clients[client_of(w)].used_bytes);
    dedup_twice(w, NULL);
    int64_t after = atomic_load(&w->seg->clients[client_of(w)].used_bytes);
    expect(ephemeral_twins(w) == evictable(w)->pages * (PAGES / KINDS) && ephemeral_twins(w) > PAGES * 2 / 3,
           "%lld twins of %lld originals", (long long)ephemeral_twins(w), (long long)evictable(w)->pages);
    expect(before - after == atomic_load(&w->seg->super->twin_bytes), "saved %lld, says %lld", (long long)(before - after),
           (long long)atomic_load(&w->seg->super->twin_bytes));
    uint32_t one = 1;
    while (!original_at(w, one))
        one++;
    for (uint32_t i = 0; i < 20 * RAW_PER_CHUNK; i++)
        put_sized(&w->ephemeral, 1000 + i, RAW); /* younger ones: hits of the youngest do not count */
    expect(keeps(&w->ephemeral, one, 1) && keeps(&w->ephemeral, one + KINDS, 1), "page %u is lost", one);
    expect(slot_freq(atomic_load(original_at(w, one))) == 2, "hits of two twins are not their original's");
    put_version(&w->ephemeral, 0, 2);
    expect(keeps(&w->ephemeral, 0, 2), "the new version of page 0");
    for (uint32_t i = 1; i < PAGES; i++)
        expect(keeps(&w->ephemeral, i, 1), "page %u is lost", i);
    check(w);
    no_original_is_left(w);
}

static int64_t export_ephemeral(struct world *w, struct actor *a)
{
    static uint8_t records[65536];
    struct tm_export e = {.pool = w->ephemeral};
    int64_t n, some = 0;
    (void)a;
    while ((n = tm_export_fill(&e, records, sizeof records)) > 0)
        some = 1;
    return n < 0 ? n : some;
}

/* What a twin names is neither a page nor a trace: it is dying with its pool before the twin's is, or damaged. Who reads
 * it does not wait for that to change. */
static void original_without_trace(struct world *w)
{
    pair_ephemeral(w);
    slot_t *original = original_at(w, 0);
    evict_original(w, original);
    uint64_t word = atomic_load(original);
    for (unsigned type = 0; type < 2; type++) {
        atomic_store(original, slot_next(word, type ? SLOT_DEAD : SLOT_EMPTY, 0));
        pid_t reader = start(0, get_ephemeral, 0, 0), exporter = start(1, export_ephemeral, 0, 0);
        finish(0, reader);
        finish(1, exporter);
        expect(actors[0].result == 0, "a get says %lld", (long long)actors[0].result);
        expect(actors[1].result == 1, "an export says %lld", (long long)actors[1].result);
    }
    atomic_store(original, word);
    all_right_or_gone(w);
}

/* Some originals go. Their twins are misses that can be put again, and nothing of them stays. */
static void originals_are_evicted(struct world *w)
{
    uint8_t page[TM_PAGE];
    pair_ephemeral(w);
    evict_some(w, 0);
    check(w);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(i % KINDS % 3 ? keeps(&w->ephemeral, i, 1) : right_or_gone(w, i, 1), "page %u", i);
    expect(tm_get(&w->ephemeral, oid, 0, page, 1) == 0, "a page without its original");
    evict_some(w, 1);
    put_version(&w->ephemeral, 1, 2);
    expect(keeps(&w->ephemeral, 1, 2), "what was put over such a twin is lost");
    expect(tm_flush(&w->ephemeral, oid, 4, 1) >= 0 && tm_get(&w->ephemeral, oid, 4, page, 1) == 0, "a flush");
    check(w);
    dedup(w, NULL);
    expect(ephemeral_twins(w) == evictable(w)->pages * (PAGES / KINDS), "twins of pages that are gone stay");
    check(w);
    no_original_is_left(w);
}

/* Originals go; before anybody has looked at all slots, a pass that begins with the first place needs some for others. */
static void place_stays_taken(struct world *w)
{
    pair_ephemeral(w);
    evict_some(w, 0);
    fill_ephemeral(w, 100, 2);
    finish(0, start(0, dedup, 0, 0));
    expect(ephemeral_twins(w) > PAGES * 2 / 3, "the scenario did not come about");
    all_right_or_gone(w);
    for (uint32_t i = 100; i < 100 + PAGES; i++)
        expect(keeps(&w->ephemeral, i, 2), "page %u is lost", i);
    no_original_is_left(w);
}

/* All originals go. Their object is empty, and must stay as long as twins name its slots. */
static void object_stays(struct world *w)
{
    pair_ephemeral(w);
    for (uint32_t i = 0; i < 3; i++)
        evict_some(w, i);
    look_for_empty(w->seg);
    check(w);
    fill_ephemeral(w, 100, 2);
    all_right_or_gone(w);
    no_original_is_left(w);
}

/* A reader has read that a page is a twin. Its original goes, the twin is found out, and another original takes its place. */
static void reader_before_original(struct world *w)
{
    pair_ephemeral(w);
    slot_t *place = original_at(w, 0);
    pid_t reader = start(0, get_ephemeral, 116, 0);
    at_point(0);
    for (uint32_t i = 0; i < 3; i++)
        evict_some(w, i);
    dedup(w, NULL); /* takes the traces away */
    fill_ephemeral(w, 100, 2);
    finish(1, start(1, dedup, 0, 0)); /* begins with the first place */
    bool again = false;
    for (uint32_t i = 100; i < 100 + KINDS; i++)
        again |= original_at(w, i) == place;
    expect(again, "the scenario did not come about");
    finish(0, reader);
    expect(actors[0].result == 0, "the reader got what took the place");
    check(w);
    no_original_is_left(w);
}

/* A reader is in the block of an original when that is evicted and its memory used. */
static void reader_in_evicted(struct world *w)
{
    pair_ephemeral(w);
    pid_t reader = start(0, get_ephemeral, 46, 0);
    at_point(0);
    tm_evict(ctx_get(w->seg), (int)client_of(w), UINT64_MAX, true);
    for (uint32_t i = 200; i < 1200; i++)
        put(&w->ephemeral, i, 1);
    finish(0, reader);
    expect(!actors[0].result || has(actors[0].page, 0, 1), "the reader got another page");
    all_right_or_gone(w);
    no_original_is_left(w);
}

/* A pass has found an original as it was, and makes a page its twin; meanwhile it is evicted. */
static void evicted_before_join(struct world *w, uint32_t point)
{
    static const uint64_t id[3];
    fill_ephemeral(w, 0, 1);
    pid_t pass = start(0, dedup, point, 5);
    at_point(0);
    uint32_t first = originals_of(w->seg, w->ephemeral.pool);
    for (uint32_t i = 0; i < KINDS; i++) {
        struct cursor cur = {0};
        struct tm_ctx *ctx = ctx_get(w->seg);
        op_begin(ctx);
        cursor_find(w->seg, first, id, i, &cur);
        if (cur.slots)
            slot_flush(ctx, first, &cur.slots[i - cur.first], SLOT_EMPTY);
        op_end(ctx);
    }
    finish(0, pass);
    all_right_or_gone(w);
    dedup_twice(w, NULL);
    all_right_or_gone(w);
    no_original_is_left(w);
}

static void evicted_before_look(struct world *w) { evicted_before_join(w, 111); }
static void evicted_after_look(struct world *w) { evicted_before_join(w, 118); }

/* Whoever removes the twins of what was evicted dies; and so does whoever removes originals without twins. */
static void death_in_look(struct world *w, uint32_t point)
{
    pair_ephemeral(w);
    evict_some(w, 0);
    for (uint32_t i = 0; i < PAGES; i++)
        if (i % KINDS % 3 == 1)
            tm_flush(&w->ephemeral, oid, i, 1);
    pid_t pass = start(0, dedup, point, 0);
    at_point(0);
    die(pass);
    check(w);
    all_right_or_gone(w);
    dedup(w, NULL);
    for (uint32_t i = 2; i < PAGES; i += KINDS)
        expect(keeps(&w->ephemeral, i, 1), "page %u is lost", i);
    no_original_is_left(w);
}

static void death_at_twin(struct world *w) { death_in_look(w, 117); }
static void death_at_original(struct world *w) { death_in_look(w, 115); }

/* Ephemeral pages are evicted for others while equal ones are kept once; those that are there are right. */
static void under_pressure(struct world *w)
{
    uint32_t there = 0;
    allow(w);
    for (uint32_t round = 0; round < 6; round++) {
        for (uint32_t i = 0; i < 40 * RAW_PER_CHUNK * 8; i++) {
            uint8_t page[TM_PAGE];
            sized_page(page, i / 2 + round, RAW);
            tm_put(&w->ephemeral, oid, i, page, 1, KEEP_OLD);
        }
        dedup(w, NULL);
        for (uint32_t i = 0; i < 40 * RAW_PER_CHUNK * 8; i++) {
            uint8_t page[TM_PAGE], want[TM_PAGE];
            sized_page(want, i / 2 + round, RAW);
            bool found = tm_get(&w->ephemeral, oid, i, page, 1) == 1;
            there += found;
            expect(!found || memcmp(page, want, TM_PAGE) == 0, "page %u is another one", i);
        }
    }
    expect(there > 1000 && atomic_load(&w->seg->super->twins) > 1000, "the scenario did not come about");
    check(w);
    no_original_is_left(w);
}

/* Of a shared pool whose owner wants it: whoever shares it, and never with private pages. */
static void shared_pages_are_kept_once(struct world *w)
{
    static const uint8_t uuid[TM_UUID] = {1, 2, 3};
    struct tm_handle one = {.seg = w->seg}, two = {.seg = w->seg};
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t id, serial, mine = client_of(w), my_serial = atomic_load(&w->seg->clients[mine].serial);
    struct pool_wish wish = {.uuid = uuid, .id = -1};
    client_open(ctx, "other", true, &id, &serial);
    client_authorise(ctx, mine, my_serial, uuid);
    client_authorise(ctx, id, serial, uuid);
    expect(pool_new(ctx, mine, my_serial, &wish, &one.pool, &one.serial) == TM_OK, "no shared pool");
    expect(pool_new(ctx, id, serial, &wish, &two.pool, &two.serial) == TM_OK, "no member");
    uint32_t pool = w->seg->pools[one.pool].link;
    fill_ephemeral(w, 0, 1);
    for (uint32_t i = 0; i < KINDS; i++) {
        put_version(&one, i, 1);
        put_version(&two, i + KINDS, 1);
    }
    dedup_twice(w, NULL);
    int64_t shared_twins = atomic_load(&w->seg->pools[pool].twin_pages);
    expect(shared_twins > KINDS, "%lld twins in the shared pool",
           (long long)shared_twins);
    expect(atomic_load(&w->seg->pools[originals_of(w->seg, pool)].pages) * 2 == shared_twins, "originals of the shared pool");
    expect(evictable(w)->pages * 3 == ephemeral_twins(w), "private pages are kept with shared ones");
    for (uint32_t i = 0; i < 2 * KINDS; i++)
        expect(keeps(&one, i, 1) && keeps(&two, i, 1), "page %u is lost", i);
    check(w);
    pool_destroy(ctx, one.pool, one.serial); /* its owner leaves; what it used last goes */
    check(w);
    for (uint32_t i = 0; i < 2 * KINDS; i++) {
        uint8_t page[TM_PAGE];
        expect(tm_get(&two, oid, i, page, 1) == 0 || has(page, i, 1), "page %u is another one", i);
    }
    dedup(w, NULL);
    pool_destroy(ctx, two.pool, two.serial);
    check(w);
    expect(atomic_load(&w->seg->pools[pool].state) == FREE, "the shared pool is still there");
    expect(atomic_load(&w->seg->pools[originals_of(w->seg, pool)].state) == FREE, "its originals are still there");
}

/* A client is turned off and on again: nothing of before is seen, and nothing stays. */
static void off_and_on(struct world *w)
{
    uint8_t page[TM_PAGE];
    uint32_t client = client_of(w), serial = atomic_load(&w->seg->clients[client].serial);
    pair_ephemeral(w);
    client_set_mode(ctx_get(w->seg), client, serial, MODE_OFF);
    check(w);
    client_set_mode(ctx_get(w->seg), client, serial, MODE_ON);
    for (uint32_t i = 0; i < PAGES; i++)
        expect(tm_get(&w->ephemeral, oid, i, page, 1) == 0, "page %u is still there", i);
    pair_ephemeral(w);
    all_right_or_gone(w);
    no_original_is_left(w);
}

#endif
