/* The native core against arrays, in one process: built with the address and undefined-behaviour sanitizers.
 *
 *   store PATH [seed] */
#include "sizes.h"

#include <unistd.h>

static int failures;
static const char *path;

static void expect(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "FAIL %s\n", what);
        failures++;
    }
}

static void say(void *arg, const char *line)
{
    (void)arg;
    expect(false, line);
}

void kill_point(int n) { (void)n; }

static struct tm_segment *fresh(unsigned mib)
{
    struct tm_segment *seg = NULL;
    unlink(path);
    if (tm_create(path, (uint64_t)mib << 20, &seg)) {
        fprintf(stderr, "cannot create %s\n", path);
        exit(2);
    }
    return seg;
}

static struct tm_handle new_pool(struct tm_segment *seg, const char *client, bool persistent, bool exclusive)
{
    struct tm_handle h = {seg, 0, 0};
    uint32_t id, serial;
    expect(client_open(ctx_get(seg), client, true, &id, &serial) == TM_OK, "client");
    expect(pool_new(ctx_get(seg), id, serial, &(struct pool_wish){.persistent = persistent, .exclusive = exclusive, .id = -1},
                    &h.pool, &h.serial) == TM_OK, "pool");
    return h;
}

/* Every sort of page comes back as it was, at lengths around every threshold. */
static void codec(void)
{
    struct tm_segment *seg = fresh(16);
    struct tm_handle h = new_pool(seg, "codec", true, false);
    uint8_t oid[TM_OID] = {0}, page[TM_PAGE], back[TM_PAGE];
    for (unsigned n = 0; n <= TM_PAGE; n += n < 64 || n > 3900 ? 1 : 61) {
        uint64_t rng = n;
        memset(page, (int)n, sizeof page);
        for (unsigned i = 0; i < n; i++)
            page[i] = (uint8_t)next_random(&rng);
        expect(tm_put(&h, oid, n, page, 1, KEEP_NOTHING) == 1, "put");
        expect(tm_get(&h, oid, n, back, 1) == 1 && !memcmp(page, back, TM_PAGE), "page came back");
    }
    static const uint64_t words[] = {0, 1, 0xffffffffffffffffu, 0x1234567812345678u, (UINT64_C(1) << 35) - 1,
                                     UINT64_C(1) << 35, 0xdeadbeefu, UINT64_C(0x0102030405060708)};
    for (unsigned i = 0; i < sizeof words / 8; i++) {
        for (unsigned k = 0; k < TM_PAGE; k += 8)
            memcpy(page + k, &words[i], 8);
        expect(tm_put(&h, oid, 5000 + i, page, 1, KEEP_NOTHING) == 1, "put of a word");
        expect(tm_get(&h, oid, 5000 + i, back, 1) == 1 && !memcmp(page, back, TM_PAGE), "word came back");
    }
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

/* Random operations on ranges, against arrays of versions; memory is short, so puts are refused and pages evicted. */
static void ranges(uint64_t seed)
{
    enum { N = 6000, MOST = 40 };
    static uint32_t persistent[N], ephemeral[N];
    static uint8_t data[MOST * TM_PAGE], back[MOST * TM_PAGE];
    struct tm_segment *seg = fresh(8);
    struct tm_handle p = new_pool(seg, "a", true, false), e = new_pool(seg, "b", false, false);
    uint8_t oid[TM_OID] = {1};
    uint32_t version = 0;
    memset(persistent, 0, sizeof persistent);
    memset(ephemeral, 0, sizeof ephemeral);
    for (unsigned step = 0; step < 4000; step++) {
        uint64_t r = next_random(&seed);
        bool keep = r >> 60 & 1, is_p = r & 1;
        struct tm_handle *h = is_p ? &p : &e;
        uint32_t *model = is_p ? persistent : ephemeral, n = 1 + (uint32_t)(r >> 8) % MOST;
        uint32_t index = (uint32_t)(r >> 20) % (N - n);
        if (r >> 2 & 1) {
            version++;
            for (uint32_t i = 0; i < n; i++)
                page_make(data + i * TM_PAGE, index + i, version);
            int64_t rc = tm_put(h, oid, index, data, n, keep);
            expect(rc >= 0, "put of a range");
            for (uint32_t i = 0; i < n; i++) {
                bool there = tm_get(h, oid, index + i, back, 1) == 1;
                bool now = there && page_is(back, index + i, version);
                bool before = there && model[index + i] && page_is(back, index + i, model[index + i]);
                expect(!there || now || before, "neither old nor new");
                expect(!before || now || keep || i >= rc, "a refused put left the old page");
                if (is_p && keep && model[index + i])
                    expect(there, "a page was lost that was to be kept");
                model[index + i] = now ? version : before ? model[index + i] : 0;
            }
        } else if (r >> 3 & 1) {
            int64_t rc = tm_get(h, oid, index, back, n);
            for (uint32_t i = 0; i < (uint32_t)rc; i++)
                expect(model[index + i] && page_is(back + i * TM_PAGE, index + i, model[index + i]), "get of a range");
            expect(rc == n || !is_p || !model[index + rc], "a persistent page is missing");
            if (rc < n)
                model[index + rc] = 0;
        } else {
            expect(tm_flush(h, oid, index, n) >= 0, "flush of a range");
            memset(model + index, 0, n * sizeof *model);
        }
        if (step % 500 == 0)
            tm_check(ctx_get(seg), say, NULL);
    }
    tm_evict(ctx_get(seg), -1, UINT64_MAX, false);
    expect(seg->pools[e.pool].pages == 0 || seg->pools[e.pool].bytes == 0, "evict leaves only same-filled pages");
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

static void device(uint64_t seed)
{
    enum { SIZE = 1 << 20 };
    static uint8_t model[SIZE], data[SIZE];
    struct tm_segment *seg = fresh(16);
    struct tm_device d = {new_pool(seg, "disk", true, false), {0}, SIZE};
    memset(model, 0, sizeof model);
    for (unsigned step = 0; step < 3000; step++) {
        uint64_t r = next_random(&seed), offset = (r >> 4) % SIZE, n = (r >> 30) % (r & 8 ? 100000 : 6000);
        if (n > SIZE - offset)
            n = SIZE - offset;
        if (r % 4 < 2) {
            for (uint64_t i = 0; i < n; i++)
                data[i] = (uint8_t)(i % 7 ? r : mix(r + i));
            uint64_t done = 1;
            expect(dev_write(&d, data, offset, n, &done) == TM_OK && done == n + 1, "device write");
            memcpy(model + offset, data, n);
        } else if (r % 4 == 2) {
            expect(dev_zero(&d, offset, n) == TM_OK, "device zero");
            memset(model + offset, 0, n);
        } else {
            expect(dev_read(&d, data, offset, n) == TM_OK && !memcmp(data, model + offset, n), "device read");
        }
    }
    expect(dev_read(&d, data, 0, SIZE) == TM_OK && !memcmp(data, model, SIZE), "device as a whole");
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

/* A flipped bit anywhere in a stored block is found; nothing of it reaches the reader as a page. */
static void corruption(void)
{
    struct tm_segment *seg = fresh(8);
    struct tm_handle p = new_pool(seg, "p", true, false), e = new_pool(seg, "e", false, false);
    uint8_t oid[TM_OID] = {0}, page[TM_PAGE], back[TM_PAGE];
    for (uint32_t i = 0; i < 200; i++) {
        struct tm_handle *h = i % 2 ? &p : &e;
        page_make(page, 3, i * 16 + 5);
        if (tm_put(h, oid, i, page, 1, KEEP_NOTHING) != 1)
            continue;
        struct cursor cur = {0};
        uint64_t id[3] = {0};
        cursor_find(seg, h->pool, id, i, &cur);
        uint64_t word = atomic_load(&cur.slots[i - cur.first]);
        if (slot_type(word) != SLOT_BLOCK)
            continue;
        uint8_t *block = (uint8_t *)block_at(seg, word & SLOT_VALUE);
        uint32_t length = block_length(atomic_load(&block_at(seg, word & SLOT_VALUE)->word)) + TM_HEADER;
        uint64_t at_bit = mix(i) % (length * 8);
        if (at_bit >= 54 && at_bit < 64) /* spare bits of the header word are covered by the checksum as well */
            at_bit = 0;
        block[at_bit / 8] ^= (uint8_t)(1 << at_bit % 8);
        int64_t rc = tm_get(h, oid, i, back, 1);
        expect(rc == (i % 2 ? TM_CORRUPT : 0), "a flipped bit goes unnoticed");
        block[at_bit / 8] ^= (uint8_t)(1 << at_bit % 8);
    }
    tm_close(seg);
}

static struct tm_block *block_of_page(struct tm_segment *seg, const struct tm_handle *h, uint32_t index);

/* Pages as they are that are read in one go, each hashed while it is copied: they come back over all borders of leaves and chunks,
 * and up to a flipped bit. */
static void runs(void)
{
    enum { RUN = 80 };
    static uint8_t pages[RUN * TM_PAGE], back[RUN * TM_PAGE];
    struct tm_segment *seg = fresh(8);
    uint8_t oid[TM_OID] = {0};
    uint64_t rng = 7;
    for (size_t i = 0; i < sizeof pages; i++)
        pages[i] = (uint8_t)next_random(&rng);
    for (int persistent = 0; persistent < 2; persistent++) {
        struct tm_handle h = new_pool(seg, "runs", persistent, false);
        expect(tm_put(&h, oid, 0, pages, RUN, KEEP_NOTHING) == RUN, "a run is put");
        for (uint32_t bad = 0; bad <= RUN; bad += 1 + bad % 3) {
            uint8_t *byte = bad < RUN ? (uint8_t *)(block_of_page(seg, &h, bad) + 1) + mix(bad) % TM_PAGE : NULL;
            memset(back, 0, sizeof back);
            if (byte)
                *byte ^= 4;
            int64_t found = tm_get(&h, oid, 0, back, RUN);
            if (byte)
                *byte ^= 4;
            expect(found == (persistent && !bad ? TM_CORRUPT : (int64_t)bad), "a run ends at a flipped bit");
            expect(!memcmp(back, pages, (size_t)bad * TM_PAGE), "the pages before it are right");
            if (byte && !persistent) /* dropped */
                expect(tm_put(&h, oid, bad, pages + (size_t)bad * TM_PAGE, 1, KEEP_NOTHING) == 1, "put again");
        }
    }
    tm_close(seg);
}

static struct tm_block *block_of_page(struct tm_segment *seg, const struct tm_handle *h, uint32_t index)
{
    struct cursor cur = {0};
    uint64_t id[3] = {0};
    cursor_find(seg, h->pool, id, index, &cur);
    uint64_t word = cur.slots ? atomic_load(&cur.slots[index - cur.first]) : 0;
    return slot_type(word) == SLOT_BLOCK ? block_at(seg, word & SLOT_VALUE) : NULL;
}

static void condense_all(struct tm_segment *seg, unsigned what)
{
    uint64_t spent_ns;
    tm_condense(ctx_get(seg), 0, UINT64_MAX, what, &spent_ns, NULL);
}

/* A page of which LZ4 makes less than zstd does: few different bytes, in no order. */
static void spread_page(uint8_t *page, uint64_t seed)
{
    for (unsigned i = 0; i < TM_PAGE; i++)
        page[i] = (uint8_t)("etaoin"[next_random(&seed) % 6]);
}

/* Cold pages become smaller, are read back as they were, show every flipped bit, and become LZ4 blocks when hit. */
static void condensing(void)
{
    enum { N = 400 };
    const unsigned both = CONDENSE_PERSISTENT | CONDENSE_EPHEMERAL;
    struct tm_segment *seg = fresh(16);
    struct tm_handle h[2] = {new_pool(seg, "p", true, false), new_pool(seg, "e", false, false)};
    static const uint8_t oid[TM_OID];
    uint8_t page[TM_PAGE], back[TM_PAGE];
    for (uint32_t i = 0; i < N; i++) {
        spread_page(page, i + 1);
        for (unsigned k = 0; k < 2; k++)
            expect(tm_put(&h[k], oid, i, page, 1, KEEP_NOTHING) == 1, "put");
    }
    int64_t before = seg->pools[h[0].pool].bytes;
    condense_all(seg, both); /* what was put since the last time is not cold yet */
    condense_all(seg, both);
    expect(atomic_load(&seg->super->condensed) == 0, "a warm page was condensed");
    for (uint32_t i = 0; i < N / 4; i++)
        for (unsigned k = 0; k < 2; k++)
            tm_get(&h[k], oid, i, back, 1);
    condense_all(seg, both);
    uint64_t condensed = atomic_load(&seg->super->condensed);
    expect(condensed > 2 * N * 7 / 10 && condensed <= 2 * N * 3 / 4, "all cold pages are condensed and no others");
    expect(seg->pools[h[0].pool].bytes < before * 4 / 5, "condensed pages take less memory");
    tm_check(ctx_get(seg), say, NULL);
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++) {
            struct tm_block *b = block_of_page(seg, &h[k], i);
            uint64_t word = b ? atomic_load(&b->word) : 0;
            bool is_condensed = block_kind(word) == BLOCK_ZSTD;
            expect(i < N / 4 ? !is_condensed : i < N / 4 + 30 || is_condensed, "the right pages are condensed");
            if (is_condensed && k == 0) {
                uint64_t at_bit = mix(i) % ((block_length(word) + TM_HEADER) * 8);
                ((uint8_t *)b)[at_bit / 8] ^= (uint8_t)(1 << at_bit % 8);
                expect(tm_get(&h[k], oid, i, back, 1) == TM_CORRUPT, "a flipped bit goes unnoticed");
                ((uint8_t *)b)[at_bit / 8] ^= (uint8_t)(1 << at_bit % 8);
            }
            spread_page(page, i + 1);
            expect(tm_get(&h[k], oid, i, back, 1) == 1 && !memcmp(page, back, TM_PAGE), "page came back");
        }
    condense_all(seg, both);
    expect(atomic_load(&seg->super->restored) == 0, "one interval of hits does not restore a page");
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++)
            tm_get(&h[k], oid, i, back, 1);
    condense_all(seg, both);
    expect(atomic_load(&seg->super->restored) == condensed, "pages that are hit again and again are restored");
    tm_check(ctx_get(seg), say, NULL);
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++) {
            spread_page(page, i + 1);
            expect(tm_get(&h[k], oid, i, back, 1) == 1 && !memcmp(page, back, TM_PAGE), "restored page came back");
        }
    tm_close(seg);
}

/* What is condensed now, and what it saves, is what blocks take less than those before them: also when others of the pages
 * are flushed, these are moved, or stored as before. */
static void condensed_now(void)
{
    enum { N = 400 };
    struct tm_segment *seg = fresh(16);
    struct tm_handle h[2] = {new_pool(seg, "p", true, false), new_pool(seg, "e", false, false)};
    static const uint8_t oid[TM_OID];
    static int64_t before[2][N];
    uint8_t page[TM_PAGE], back[TM_PAGE];
    uint64_t spent_ns;
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++) {
            spread_page(page, i + 1);
            expect(tm_put(&h[k], oid, i, page, 1, KEEP_NOTHING) == 1, "put");
        }
    for (uint32_t i = 0; i < N; i++)
        for (unsigned k = 0; k < 2; k++)
            before[k][i] = stride_at(seg, off(seg, block_of_page(seg, &h[k], i)) / 16);
    for (unsigned step = 0; step < 5; step++) {
        struct tm_condensed found = {0}, expected = {0};
        for (uint32_t i = 0; i < N; i++)
            for (unsigned k = 0; k < 2; k++) {
                if (step == 2 && i % 4)
                    tm_flush(&h[k], oid, i, 1);
                if (step == 4)
                    tm_get(&h[k], oid, i, back, 1);
            }
        if (step == 3) {
            tm_compact(ctx_get(seg), 8, UINT64_C(10000000000));
            expect(atomic_load(&seg->super->relocated) > N / 8, "few pages were moved");
            expect(atomic_load(&seg->super->compacting_ns) > 0, "that took no time");
        }
        if (step == 4) {
            tm_condense(ctx_get(seg), 0, UINT64_MAX, 0, &spent_ns, NULL);
            for (uint32_t i = 0; i < N; i++)
                for (unsigned k = 0; k < 2; k++)
                    tm_get(&h[k], oid, i, back, 1);
        }
        tm_condense(ctx_get(seg), 0, UINT64_MAX, step ? 0 : CONDENSE_PERSISTENT | CONDENSE_EPHEMERAL | CONDENSE_ALL, &spent_ns,
                    &found);
        for (uint32_t i = 0; i < N; i++)
            for (unsigned k = 0; k < 2; k++) {
                const struct tm_block *b = block_of_page(seg, &h[k], i);
                if (!b || block_kind(atomic_load(&b->word)) != BLOCK_ZSTD)
                    continue;
                expected.pages++;
                expected.saved += before[k][i] - stride_at(seg, off(seg, b) / 16);
            }
        if (found.pages != expected.pages || found.saved != expected.saved)
            fprintf(stderr, "step %u: %llu pages save %lld bytes, not %llu and %lld\n", step, (unsigned long long)found.pages,
                    (long long)found.saved, (unsigned long long)expected.pages, (long long)expected.saved);
        expect(found.pages == expected.pages && found.saved == expected.saved, "what is condensed now, and what it saves");
        expect(step == 4 ? found.pages < N / 40 : found.pages >= N / 3 && found.saved > (int64_t)found.pages * 256,
               "the scenario did not come about");
        if (!step)
            expect(found.pages == atomic_load(&seg->super->condensed)
                   && (uint64_t)found.saved == atomic_load(&seg->super->condensed_bytes), "the counters say otherwise");
    }
    expect(atomic_load(&seg->super->restored_bytes) > (uint64_t)N * 64, "restored pages took no memory");
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

/* Loose pages become LZ4 blocks, warm or not; and condensing evicts nothing and needs no memory that is not there. */
static void condensing_when_full(void)
{
    struct tm_segment *seg = fresh(8);
    struct tm_handle p = new_pool(seg, "p", true, false), e = new_pool(seg, "e", false, false);
    static const uint8_t oid[TM_OID];
    uint8_t page[TM_PAGE], back[TM_PAGE];
    uint32_t n = 0, loose = 0;
    for (; loose < 200; loose++) {
        spread_page(page, loose + 1);
        expect(tm_put(&e, oid, loose, page, 1, KEEP_NOTHING) == 1, "put");
    }
    expect(seg->pools[e.pool].raw_pages == loose, "pages are loose");
    condense_all(seg, CONDENSE_LOOSE);
    expect(seg->pools[e.pool].raw_pages == 0 && seg->pools[e.pool].pages == loose, "loose pages are compressed");
    for (;; n++) {
        spread_page(page, n + 1);
        if (tm_put(&p, oid, n, page, 1, KEEP_NOTHING) != 1)
            break;
    }
    int64_t held = seg->pools[e.pool].pages;
    uint64_t evicted = seg->pools[e.pool].counters[C_EVICTIONS];
    condense_all(seg, CONDENSE_PERSISTENT | CONDENSE_EPHEMERAL | CONDENSE_ALL);
    expect(seg->pools[e.pool].pages == held && seg->pools[e.pool].counters[C_EVICTIONS] == evicted, "nothing was evicted");
    expect(atomic_load(&seg->super->condensed) > n / 2, "pages are condensed in a full segment");
    for (uint32_t i = 0; i < n; i++) {
        spread_page(page, i + 1);
        expect(tm_get(&p, oid, i, back, 1) == 1 && !memcmp(page, back, TM_PAGE), "page came back");
    }
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

/* Holes that flushed pages leave in every chunk are memory for pages of any other size, and nothing is lost. */
static void compaction(void)
{
    enum { FEW = 5 };
    static const uint8_t oid[TM_OID];
    static const uint32_t sizes[] = {512, 60, 250, 350, 20}; /* 512: raw */
    struct tm_segment *seg = fresh(16);
    struct tm_handle h = new_pool(seg, "p", true, false);
    uint8_t page[TM_PAGE], back[TM_PAGE];
    uint32_t kept[8], first = 0;
    for (uint32_t s = 0; s < sizeof sizes / sizeof *sizes; s++, first += 1000000) {
        uint32_t n = put_until_refused(&h, first, sizes[s]), need = sizes[s] == 512 ? 4160 : sizes[s] * 8 + 128;
        uint64_t room = (uint64_t)seg->nchunks * TM_CHUNK;
        if ((uint64_t)n * need < room * 7 / 10) {
            fprintf(stderr, "pages of %u words: only %u were stored\n", sizes[s], n);
            expect(false, "holes are not used");
        }
        kept[s] = n;
        for (uint32_t i = 0; i < n; i++)
            if (i % 100 >= FEW)
                tm_flush(&h, oid, first + i, 1);
    }
    first = 0;
    for (uint32_t s = 0; s < sizeof sizes / sizeof *sizes; s++, first += 1000000)
        for (uint32_t i = 0; i < kept[s]; i++) {
            sized_page(page, first + i, sizes[s]);
            int64_t rc = tm_get(&h, oid, first + i, back, 1);
            expect(i % 100 < FEW ? rc == 1 && !memcmp(page, back, TM_PAGE) : rc == 0, "a page after compaction");
        }
    expect(atomic_load(&seg->super->relocated) > 0, "pages were moved");
    tm_check(ctx_get(seg), say, NULL);
    tm_close(seg);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    path = argv[1];
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    codec();
    ranges(seed);
    device(seed);
    corruption();
    runs();
    condensing();
    condensed_now();
    condensing_when_full();
    compaction();
    unlink(path);
    printf("store: %s\n", failures ? "FAILED" : "ok");
    return failures != 0;
}
