/* What must hold when memory is short: floors, caps, limits that fall, refused puts, compaction; and what damage or a
 * mode must not do beyond itself.
 *
 *   limits PATH [scenario] */
#include "scenarios.h"
#include "sizes.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

struct client {
    uint32_t id, serial;
    struct tm_handle pool;
};

static struct client new_client(struct world *w, const char *name, bool persistent)
{
    struct client c = {.pool = {.seg = w->seg}};
    struct pool_wish wish = {.persistent = persistent, .id = -1};
    expect(client_open(ctx_get(w->seg), name, true, &c.id, &c.serial) == TM_OK, "client %s", name);
    expect(pool_new(ctx_get(w->seg), c.id, c.serial, &wish, &c.pool.pool, &c.pool.serial) == TM_OK, "pool of %s", name);
    return c;
}

/* A client that was promised `floor` bytes. */
static struct client promised_client(struct world *w, bool persistent, uint64_t floor)
{
    struct client c = new_client(w, "promised", persistent);
    int rc = client_set_floor(ctx_get(w->seg), c.id, c.serial, floor);
    expect(rc == TM_OK, "a floor of %llu bytes says %d", (unsigned long long)floor, rc);
    return c;
}

static void set_cap(struct world *w, const struct client *c, uint64_t bytes)
{
    expect(client_set(ctx_get(w->seg), c->id, c->serial, VALUE_CAP, bytes), "a cap");
}

static uint32_t chunks_used(struct world *w) { return atomic_load(&w->seg->super->nused); }

static int64_t pages_of(const struct tm_handle *h) { return atomic_load(&h->seg->pools[h->pool].pages); }

static int64_t objects_of(const struct tm_handle *h) { return atomic_load(&h->seg->pools[h->pool].objects); }

static int64_t units_of(const struct tm_handle *h) { return atomic_load(&h->seg->pools[h->pool].nodes); }

/* Change a bit in the stored form of a page, or change it back. */
static void damage(const struct tm_handle *h, uint32_t index)
{
    struct cursor cur = {0};
    uint64_t id[3] = {0};
    cursor_find(h->seg, h->pool, id, index, &cur);
    uint64_t word = cur.slots ? atomic_load(&cur.slots[index - cur.first]) : 0;
    expect(slot_type(word) == SLOT_BLOCK, "page %u has no block", index);
    if (slot_type(word) == SLOT_BLOCK)
        ((uint8_t *)(block_at(h->seg, word & SLOT_VALUE) + 1))[7] ^= 1;
}

/* ---- Floors ----------------------------------------------------------------------------------------------- */

/* Floors beyond all memory are refused, also those that come out small where they are counted in chunks. */
static void floor_too_large(struct world *w)
{
    static const uint64_t floors[] = {UINT64_C(62400) << 32, UINT64_C(251483203663814), UINT64_C(1) << 40, INT64_MAX};
    struct client greedy = new_client(w, "greedy", true);
    for (unsigned i = 0; i < sizeof floors / sizeof *floors; i++) {
        int rc = client_set_floor(ctx_get(w->seg), greedy.id, greedy.serial, floors[i]);
        expect(rc == TM_TOO_MUCH, "a floor of %llu bytes says %d", (unsigned long long)floors[i], rc);
        expect(promised_chunks(w->seg, TM_MAX_CLIENTS) == 0, "a refused floor is in force");
    }
    check(w);
}

/* The least that a client below its floor needs, with the index: a page of every size class, put when others have
 * taken all they could. None is refused. */
static void floor_of_all_sizes(struct world *w)
{
    struct client promised = promised_client(w, true, 2 << 20);
    put_until_refused(&w->pool, 0, RAW);
    for (uint32_t i = 0, words = 8; words <= RAW; i++, words += 8)
        expect(put_sized(&promised.pool, i, words) == 1, "a page of %u words is refused below the floor", words);
    check(w);
}

/* Ephemeral pages of a client at its floor stay when others need memory: a whole chunk goes at once, and would take it
 * below. */
static void floor_of_ephemeral(struct world *w)
{
    enum { FLOOR = 2 << 20 };
    struct client promised = promised_client(w, false, FLOOR);
    for (uint32_t i = 0; client_bytes(w->seg, promised.id) <= FLOOR; i++)
        put_sized(&promised.pool, i, RAW);
    put_until_refused(&w->pool, 0, RAW);
    int64_t bytes = client_bytes(w->seg, promised.id);
    expect(bytes >= FLOOR, "%lld bytes are left of a floor of %d", (long long)bytes, FLOOR);
    check(w);
}

/* Two clients fill chunks together; the promised one flushes all it had there, so that its promise stands open again.
 * What the other flushes then it can put again: its holes count, though they are in no free chunk. */
static void flush_beside_promise(struct world *w)
{
    enum { TOGETHER = 480 };
    struct client promised = promised_client(w, true, 2 << 20);
    uint32_t flushed = 0, again = 0;
    for (uint32_t i = 0; i < TOGETHER; i++) {
        put_sized(&promised.pool, i, RAW);
        put_sized(&w->pool, i, RAW);
    }
    uint32_t n = TOGETHER + put_until_refused(&w->pool, TOGETHER, RAW);
    tm_flush(&promised.pool, oid, 0, TOGETHER);
    for (uint32_t i = TOGETHER; i < n; i++)
        if (i % RAW_PER_CHUNK >= 5)
            flushed += (uint32_t)tm_flush(&w->pool, oid, i, 1);
    for (uint32_t i = TOGETHER; i < n; i++)
        if (i % RAW_PER_CHUNK >= 5)
            again += put_sized(&w->pool, i, RAW) == 1;
    expect(again == flushed, "of %u flushed pages %u could be put again", flushed, again);
    check(w);
}

/* Two clients churn through pages of all sizes, one up to its floor, the other with as much as it can get. However the
 * size classes share out the memory, no put of the first is refused that fits below its floor. */
static void floor_under_churn(struct world *w)
{
    enum { MOST = 20000, OF_PROMISED = 5000, STEPS = 100000, LARGEST = 4160 };
    static bool stored[2][MOST];
    const int64_t floor = (int64_t)w->seg->super->memory_bytes / 2;
    struct client promised = promised_client(w, true, (uint64_t)floor);
    uint64_t rng = 5;
    unsigned refused = 0, full = 0;
    for (unsigned step = 0; step < STEPS; step++) {
        uint64_t r = next_random(&rng);
        bool its = r & 1;
        const struct tm_handle *h = its ? &promised.pool : &w->pool;
        uint32_t i = (uint32_t)(r >> 8) % (its ? OF_PROMISED : MOST), words = 8 + (uint32_t)(r >> 40) % 490;
        int64_t left = floor - client_bytes(w->seg, promised.id);
        if (stored[its][i] && r % 8 < 2) {
            tm_flush(h, oid, i, 1);
            stored[its][i] = false;
        } else if (!its || left >= LARGEST) {
            bool done = put_sized(h, i, words) == 1;
            stored[its][i] |= done;
            refused += its && !done;
        } else {
            full++;
        }
    }
    expect(!refused, "%u puts below the floor were refused", refused);
    expect(full, "the client never came near its floor");
    check(w);
}

/* Others have passed the limit with persistent pages, beside a promise, when both limits fall. What was promised can be put
 * nevertheless, also if the client's server is being started again that moment. */
static void floor_when_limits_fall(struct world *w, bool gone)
{
    enum { MIB = 1 << 20, FLOOR = 4 * MIB };
    struct client promised = promised_client(w, true, FLOOR);
    struct tm_ctx *ctx = ctx_get(w->seg);
    uint32_t stored = 0;
    tm_limit(ctx, 8 * MIB, 16 * MIB);
    put_until_refused(&w->pool, 0, RAW);
    expect(chunks_used(w) > chunk_limit(w->seg, false), "the scenario did not come about");
    atomic_store(&w->seg->clients[promised.id].held, gone ? 2 : 1);
    tm_limit(ctx, 8 * MIB, 9 * MIB);
    tm_shrink(ctx, 0, true, UINT64_MAX);
    atomic_store(&w->seg->clients[promised.id].held, 1);
    while (stored < FLOOR / 4160 && put_sized(&promised.pool, stored, RAW) == 1)
        stored++;
    expect(stored == FLOOR / 4160, "%u of %u promised pages were stored", stored, FLOOR / 4160);
    check(w);
}

static void floor_limits_fall(struct world *w) { floor_when_limits_fall(w, false); }
static void floor_limits_fall_gone(struct world *w) { floor_when_limits_fall(w, true); }

/* ---- Shrinking -------------------------------------------------------------------------------------------- */

static int64_t put_ephemeral(struct world *w, struct actor *a)
{
    (void)a;
    return put_sized(&w->ephemeral, 1000000, 20);
}

/* While somebody is stopped in an operation, what is free cannot go back to the system: nothing is evicted for that. */
static void shrink_beside_stopped(struct world *w)
{
    enum { MIB = 1 << 20, PAGES = 3000, LEFT = 2400 };
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&w->ephemeral, i, RAW);
    int64_t before = pages_of(&w->ephemeral);
    pid_t putter = start(0, put_ephemeral, 44, 0);
    at_point(0);
    tm_limit(ctx_get(w->seg), 12 * MIB, 12 * MIB);
    for (unsigned i = 0; i < 5; i++) /* as often as the manager looks */
        tm_shrink(ctx_get(w->seg), 0, true, UINT64_MAX);
    expect(chunks_used(w) <= chunk_limit(w->seg, false), "%u chunks are in use, beyond the limit", chunks_used(w));
    int64_t left = pages_of(&w->ephemeral);
    expect(before == PAGES && left > LEFT, "of %lld pages %lld are left", (long long)before, (long long)left);
    finish(0, putter);
    expect(tm_shrink(ctx_get(w->seg), 0, true, UINT64_MAX) > 0, "nothing goes back afterwards");
    check(w);
}

/* A limit that has just fallen is for tm_shrink to reach, not for whoever puts a page next: a persistent one frees about
 * as much as it takes, and is never refused for it; an ephemeral one gives up soon. */
static void put_far_beyond(struct world *w, uint64_t farthest)
{
    enum { MIB = 1 << 20, PAGES = 3000, PUTS = 150 };
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&w->ephemeral, i, RAW);
    tm_limit(ctx_get(w->seg), 6 * MIB, farthest);
    uint32_t stored = 0;
    uint64_t drains = atomic_load(&w->seg->super->drains);
    for (uint32_t i = 0; i < PUTS; i++)
        stored += put_sized(&w->pool, i, RAW) == 1;
    drains = atomic_load(&w->seg->super->drains) - drains;
    expect(stored == PUTS, "%u of %u persistent pages were stored", stored, PUTS);
    expect(drains <= 2 * PUTS / RAW_PER_CHUNK, "%llu drains for %u pages", (unsigned long long)drains, PUTS);
    drains = atomic_load(&w->seg->super->drains);
    for (uint32_t i = PAGES, more = 1; more && i < PAGES + 2 * RAW_PER_CHUNK; i++) /* the chunk that is being filled */
        more = put_sized(&w->ephemeral, i, RAW) == 1;
    drains = atomic_load(&w->seg->super->drains) - drains;
    expect(drains > 0 && drains < 40, "%llu drains for one ephemeral page", (unsigned long long)drains);
    check(w);
}

static void put_far_beyond_limit(struct world *w) { put_far_beyond(w, 16u << 20); }
static void put_far_beyond_both(struct world *w) { put_far_beyond(w, 6u << 20); }

/* ---- Refused puts ----------------------------------------------------------------------------------------- */

/* A client at its cap puts pages of ever new objects. What was made for them in vain does not stay, and nobody else
 * loses anything for it. */
static void refused_at_cap(struct world *w)
{
    enum { PUTS = 3000 };
    uint8_t id[TM_OID], page[TM_PAGE];
    struct client other = new_client(w, "other", false), capped = new_client(w, "capped", true);
    for (uint32_t i = 0; i < PUTS; i++)
        put_sized(&other.pool, i, RAW);
    uint32_t used = chunks_used(w);
    int64_t pages = pages_of(&other.pool);
    sized_page(page, 7, RAW);
    for (unsigned round = 0; round < 2; round++) {
        set_cap(w, &capped, round ? 1000 : 1); /* not even the smallest page; not this one */
        for (uint32_t i = 0; i < PUTS; i++) {
            oid_make(id, i);
            expect(tm_put(&capped.pool, id, 0, page, 1, KEEP_NOTHING) == 0, "a put beyond the cap");
        }
        if (round)
            tm_reap(ctx_get(w->seg));
        int64_t objects = objects_of(&capped.pool), units = units_of(&capped.pool);
        expect(!objects && !units, "round %u: %lld objects and %lld units of index stay", round, (long long)objects,
               (long long)units);
        expect(chunks_used(w) <= used && pages_of(&other.pool) == pages, "round %u: the other has %lld of %lld pages",
               round, (long long)pages_of(&other.pool), (long long)pages);
    }
    check(w);
}

/* With memory only in holes of a larger size class, a page would get a block of that size: not if that is beyond the
 * client's cap. */
static void cap_and_large_block(struct world *w)
{
    enum { CAP = 1280, PAGES = 16 };
    struct client capped = new_client(w, "capped", true);
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&capped.pool, i, 0); /* same-filled: there is an index, and no block */
    put_until_refused(&w->pool, 0, 400);
    for (uint32_t i = 0; i < 190; i += 19)
        tm_flush(&w->pool, oid, i, 1); /* a hole in each chunk: none can be freed */
    expect(put_sized(&w->pool, 0, 1) == 1, "the scenario did not come about"); /* without a cap */
    set_cap(w, &capped, CAP);
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&capped.pool, i, 1);
    int64_t bytes = client_bytes(w->seg, capped.id);
    expect(bytes <= CAP, "%lld bytes of a cap of %d", (long long)bytes, CAP);
    check(w);
}

/* Pages that were hit are moved when their chunk is drained for others, to a queue with few chunks, in which a bin takes several
 * sizes: not to larger blocks if that is beyond their client's cap. */
static void hit_pages_at_cap(struct world *w)
{
    enum { WORDS = 168, EXACT = 20, LAST = 6000 };
    struct tm_ctx *ctx = ctx_get(w->seg);
    struct client capped = new_client(w, "capped", false);
    const struct tm_queue *queues = w->seg->clients[capped.id].queues;
    uint32_t n = 0, first;
    while (TM_NCLASSES > atomic_load(&queues[QUEUE_PROBATION].length) / 3 && n < 2 * LAST)
        put_sized(&capped.pool, n++, WORDS);
    for (first = n; atomic_load(&queues[QUEUE_PROBATION].length) < 3 * TM_NCLASSES + EXACT; n++)
        put_sized(&capped.pool, n, WORDS);
    tm_flush(&capped.pool, oid, 0, first); /* those of bins of several sizes */
    for (uint32_t i = first; i < n; i++)
        expect(holds_sized(&capped.pool, i, WORDS), "page %u", i);
    int64_t cap = client_bytes(w->seg, capped.id), before = pages_of(&capped.pool);
    set_cap(w, &capped, (uint64_t)cap);
    op_begin(ctx);
    ctx->client = ctx->payer = TM_MAX_CLIENTS;
    for (unsigned i = 0; i < 4; i++)
        evict_chunk(ctx, -1, false);
    op_end(ctx);
    expect(atomic_load(&queues[QUEUE_MAIN].length) > 2 && pages_of(&capped.pool) == before, "they were not moved");
    expect(client_bytes(w->seg, capped.id) <= cap, "%lld bytes of a cap of %lld", (long long)client_bytes(w->seg, capped.id),
           (long long)cap);
    for (uint32_t i = n - 100; i < n; i++)
        expect(holds_sized(&capped.pool, i, WORDS), "page %u is lost", i);
    check(w);
}

/* A frozen client's puts are refused, and leave no index behind: not that of a device's writes either. */
static void frozen_and_index(struct world *w)
{
    enum { PAGES = 100 };
    static uint8_t bytes[TM_PAGE];
    struct client frozen = new_client(w, "frozen", true);
    struct tm_device device = {.pool = frozen.pool, .size = UINT64_C(1) << 30};
    uint32_t used = chunks_used(w);
    client_set_mode(ctx_get(w->seg), frozen.id, frozen.serial, MODE_FROZEN);
    for (uint32_t i = 0; i < PAGES; i++) {
        uint64_t offset = (uint64_t)i * 512 * TM_PAGE; /* a leaf each */
        expect(put_sized(&frozen.pool, i * 512, RAW) == 0, "a put to a frozen client");
        uint64_t done = 0;
        expect(dev_write(&device, bytes, offset, TM_PAGE, &done) == TM_REFUSED, "a write to a frozen client");
        expect(dev_write(&device, bytes, offset + 1000, 100, &done) == TM_REFUSED && !done, "a write of part of a page");
    }
    int64_t objects = objects_of(&frozen.pool), units = units_of(&frozen.pool);
    expect(!objects && !units, "%lld objects and %lld units of index were made", (long long)objects, (long long)units);
    expect(chunks_used(w) == used, "chunks were taken");
    check(w);
}

/* ---- Compaction ------------------------------------------------------------------------------------------- */

enum { KEPT = 3, SPARSE = 200, OTHERS = 1000000, HALF = 250 };

static bool is_kept(uint32_t i) { return i % RAW_PER_CHUNK < (i / RAW_PER_CHUNK == SPARSE ? 1 : KEPT); }

/* Fill the memory with raw pages and flush most of them: a few stay in every chunk, one in chunk SPARSE, which will be
 * emptied first. How many there were. */
static uint32_t make_holes(struct world *w)
{
    uint32_t n = put_until_refused(&w->pool, 0, RAW);
    for (uint32_t i = 0; i < n; i++)
        if (!is_kept(i))
            tm_flush(&w->pool, oid, i, 1);
    return n;
}

/* Pages of half the size find room where the raw ones were, though no chunk was free. */
static void fill_holes(struct world *w, uint32_t n)
{
    uint32_t more = put_until_refused(&w->pool, OTHERS, HALF);
    expect(more > n, "for %u raw pages only %u of half the size found room", n, more);
}

/* One page that fails its checksum does not end compaction. It is moved as it is: who asks is told, before as after. */
static void compact_corrupt(struct world *w)
{
    uint8_t page[TM_PAGE];
    const uint32_t bad = SPARSE * RAW_PER_CHUNK;
    uint32_t n = make_holes(w);
    damage(&w->pool, bad);
    fill_holes(w, n);
    for (uint32_t i = 0; i < n; i++)
        if (is_kept(i) && i != bad)
            expect(holds_sized(&w->pool, i, RAW), "page %u is lost", i);
    expect(tm_get(&w->pool, oid, bad, page, 1) == TM_CORRUPT, "the damaged page passes for a sound one, or is gone");
    expect(tm_flush(&w->pool, oid, bad, 1) == 1, "the damaged page cannot be flushed");
    check(w);
}

/* Somebody is stopped in an ephemeral put, so there always seems to be something to evict, and it never can be. What
 * can be had by compaction is had nevertheless, whether that put goes on later or dies. */
static void compact_beside(struct world *w, bool dies)
{
    pid_t putter = start(0, put_ephemeral, 44, 0);
    at_point(0);
    fill_holes(w, make_holes(w));
    if (dies)
        die(putter);
    else
        finish(0, putter);
    check(w);
}

static void compact_beside_put(struct world *w) { compact_beside(w, false); }
static void compact_beside_dead(struct world *w) { compact_beside(w, true); }

/* ---- Transfer --------------------------------------------------------------------------------------------- */

/* What is frozen or off takes no imported pages, and takes them when it is on again. */
static void import_when_shut(struct world *w)
{
    static uint8_t records[65536];
    struct tm_ctx *ctx = ctx_get(w->seg);
    struct tm_export e = {.pool = w->pool};
    struct client to = new_client(w, "to", true);
    put(&w->pool, 1, 1);
    put(&w->pool, 2, 1);
    int64_t n = tm_export_fill(&e, records, sizeof records);
    for (uint32_t mode = MODE_FROZEN; mode <= MODE_OFF; mode++)
        for (unsigned all = 0; all < 2; all++) {
            if (all)
                segment_set_mode(ctx, mode);
            else
                client_set_mode(ctx, to.id, to.serial, mode);
            int64_t rc = tm_import(&to.pool, records, (size_t)n);
            expect(rc == TM_SHUT, "mode %u: import says %lld", mode, (long long)rc);
            expect(pages_of(&to.pool) == 0, "mode %u: %lld pages were imported", mode, (long long)pages_of(&to.pool));
            segment_set_mode(ctx, MODE_ON);
            client_set_mode(ctx, to.id, to.serial, MODE_ON);
        }
    expect(tm_import(&to.pool, records, (size_t)n) == 2, "an import says how many records it took");
    expect(holds(&to.pool, 1, 1) && holds(&to.pool, 2, 1), "imported pages are not there");
    check(w);
}

static uint32_t count_records(const uint8_t *records, size_t size)
{
    uint32_t n = 0;
    for (size_t at_byte = 0; at_byte < size; n++) {
        uint16_t length;
        memcpy(&length, records + at_byte + TM_OID + 4, sizeof length);
        at_byte += TM_OID + 8 + length;
    }
    return n;
}

/* A page that fails its checksum is told, by every pass; all the others are passed on, and once. */
static void export_beside_corrupt(struct world *w)
{
    enum { PAGES = 10, BAD = 5 };
    static uint8_t records[1 << 20];
    uint32_t client = w->pool.pool / TM_CLIENT_POOLS, serial = atomic_load(&w->seg->clients[client].serial);
    for (uint32_t i = 0; i < PAGES; i++)
        put_sized(&w->pool, i, 100);
    damage(&w->pool, BAD);
    client_handoff(ctx_get(w->seg), client, serial, PHASE_COPYING);
    for (unsigned pass = 0; pass < 2; pass++) {
        struct tm_export e = {.pool = w->pool, .changes = true};
        uint32_t passed = 0, corrupt = 0;
        for (int64_t n; (n = tm_export_fill(&e, records, sizeof records)) != 0 && corrupt < PAGES;) {
            if (n > 0)
                passed += count_records(records, (size_t)n);
            else
                corrupt += n == TM_CORRUPT ? 1 : PAGES;
        }
        expect(passed == (pass ? 0 : PAGES - 1), "pass %u: %u pages were passed on", pass, passed);
        expect(corrupt == 1, "pass %u: %u corrupt pages were told", pass, corrupt);
    }
    client_handoff(ctx_get(w->seg), client, serial, PHASE_NONE);
    damage(&w->pool, BAD); /* as it was */
    check(w);
}

/* ---- Signals ---------------------------------------------------------------------------------------------- */

static unsigned calls_between; /* of fallocate, of which the last is interrupted; 0: none is */

/* As older kernels have it on tmpfs: any signal ends the call. */
int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    static unsigned calls;
    if (calls_between && ++calls % calls_between == 0) {
        errno = EINTR;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, bytes);
}

/* The system gives memory also where signals come, as to a thread that is called out of its read again and again. */
static void signals_while_it_grows(struct world *w)
{
    enum { BYTES = 8 << 20 };
    tm_trim(ctx_get(w->seg), 0);
    calls_between = 3;
    uint64_t added = tm_populate(ctx_get(w->seg), BYTES);
    calls_between = 0;
    expect(added == BYTES, "there were only %llu bytes", (unsigned long long)added);
    check(w);
}

static const struct scenario scenarios[] = {
    {"floor_too_large", floor_too_large},
    {"floor_of_all_sizes", floor_of_all_sizes},
    {"floor_of_ephemeral", floor_of_ephemeral},
    {"flush_beside_promise", flush_beside_promise},
    {"floor_under_churn", floor_under_churn},
    {"floor_limits_fall", floor_limits_fall},
    {"floor_limits_fall_gone", floor_limits_fall_gone},
    {"shrink_beside_stopped", shrink_beside_stopped},
    {"put_far_beyond_limit", put_far_beyond_limit},
    {"put_far_beyond_both", put_far_beyond_both},
    {"refused_at_cap", refused_at_cap},
    {"cap_and_large_block", cap_and_large_block},
    {"hit_pages_at_cap", hit_pages_at_cap},
    {"frozen_and_index", frozen_and_index},
    {"compact_corrupt", compact_corrupt},
    {"compact_beside_put", compact_beside_put},
    {"compact_beside_dead", compact_beside_dead},
    {"import_when_shut", import_when_shut},
    {"export_beside_corrupt", export_beside_corrupt},
    {"signals_while_it_grows", signals_while_it_grows},
};

int main(int argc, char **argv)
{
    return run_scenarios(argc, argv, scenarios, sizeof scenarios / sizeof *scenarios);
}
