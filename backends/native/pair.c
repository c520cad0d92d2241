/* Pairing: the background pass that finds equal pages and makes them twins (twin.c).
 *
 * Only this makes twins, of pages that nobody used lately, of clients that allow it; of a shared pool it is the owner
 * that does. Those of one client's persistent pools are compared with each other, those of its ephemeral ones (but not of
 * pools whose gets take pages out), and those of each shared pool: whoever shares it could read all of them anyway.
 * The pass remembers checksums of the pages that it has seen, in memory of its own; what it forgets costs only twins. */
#include "tm.h"

#include <stdlib.h>
#include <string.h>

enum {
    WAYS = 4,           /* pages that are remembered for the same low bits of their checksums */
    MOST = 1 << 20,     /* pages that are remembered in all: 20 MiB of the manager's memory */
    ROUNDS = 16         /* after so many every page is looked at again: what was forgotten, or could not be done */
};

struct seen { /* a page of some client */
    uint64_t hash, slot; /* slot number; 0: none */
};

struct tm_twins {
    uint32_t mask, rounds;
    struct seen *pages;    /* by checksum */
    uint32_t *marks;       /* by slot: which word of it was looked at */
    uint32_t hand[2][TM_NACCOUNTS]; /* index at which the next original may find room: ephemeral, persistent */
    _Alignas(64) uint8_t page[TM_PAGE], other[TM_PAGE], packed[TM_SCRATCH];
};

/* A page as it was seen: it is in `page` or `other` now. */
struct view {
    uint32_t pool;
    slot_t *slot;
    uint64_t word;
};

/* Read the page of a slot, if it is in memory, to `to`. */
static bool look(struct tm_ctx *ctx, struct view *v, uint8_t *to)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t block = v->word & SLOT_VALUE;
    return slot_type(v->word) == SLOT_BLOCK && in_data(seg, block * 16)
           && block_read(ctx, block_at(seg, block), slot_number(seg, v->slot), seg->size - block * 16, to)
           && !slot_changed(v->slot, v->word);
}

/* How often the page was hit, if its original is to keep that: of one that has proved itself, once at least. */
static uint64_t hits_of(struct tm_segment *seg, const struct view *v)
{
    uint64_t block = v->word & SLOT_VALUE, hits = v->word & SLOT_FREQ;
    uint32_t bin = seg->chunks[chunk_of(seg, block * 16)].bin;
    return bin_is_ephemeral(bin) && bin_queue(bin) == QUEUE_MAIN && !hits ? SLOT_FREQ_ONE : hits;
}

/* A new original with the page `t->page`, stored in that form, if there is room without evicting anything. */
static bool make_original(struct tm_ctx *ctx, struct tm_twins *t, uint32_t pool, uint32_t form, uint64_t hits,
                          struct view *v)
{
    struct tm_segment *seg = ctx->seg;
    bool persistent = seg->pools[pool].persistent;
    v->pool = pool;
    v->slot = free_slot(ctx, pool, &t->hand[persistent][account_of(pool)], &v->word);
    if (!v->slot)
        return false;
    const uint8_t *payload = t->packed;
    enum block_kind kind = (enum block_kind)(form & 7u);
    uint32_t length = kind == BLOCK_ZSTD ? codec_condense(seg, condense_level(seg), t->page, t->packed)
                      : kind == BLOCK_LZ4 ? codec_compress(ctx, t->page, t->packed) : TM_PAGE;
    if (length == TM_PAGE) {
        form = kind == BLOCK_LOOSE ? BLOCK_LOOSE : BLOCK_RAW;
        payload = t->page;
    }
    unsigned queue = hits ? QUEUE_MAIN : QUEUE_PROBATION;
    uint32_t bin = persistent ? BIN_PERSISTENT + size_class(length) : ephemeral_bin(seg, account_of(pool), queue, length);
    uint64_t block = block_spare(ctx, bin);
    if (!block)
        return false;
    block_write(block_at(seg, block), slot_number(seg, v->slot), form, length, payload);
    uint64_t next = slot_next(v->word, SLOT_BLOCK, block) | (persistent ? 0 : hits);
    if (!slot_replace(ctx, v->pool, v->slot, &v->word, next)) {
        block_free_new(ctx);
        return false;
    }
    v->word = next;
    KP(110);
    return true;
}

/* Let the hits of a page that becomes a twin of `original` count for that. */
static void pass_on_hits(struct tm_segment *seg, const struct view *twin, const struct view *original)
{
    uint64_t hits = hits_of(seg, twin), word = atomic_load(original->slot);
    if (!seg->pools[twin->pool].persistent && !((word ^ original->word) & ~SLOT_FREQ) && hits > (word & SLOT_FREQ))
        atomic_compare_exchange_strong(original->slot, &word, (word & ~SLOT_FREQ) | hits);
}

/* Make the slot of `twin` name `original`, which has the same page, if both are as they were seen. */
static bool join(struct tm_ctx *ctx, struct view *twin, const struct view *original)
{
    struct tm_segment *seg = ctx->seg;
    int64_t saved = stride_at(seg, twin->word & SLOT_VALUE);
    uint64_t bits = seg->pools[twin->pool].persistent ? twin->word & SLOT_FREQ : 0;
    if (!MUTANT(21) && !twins_lock(seg))
        return false;
    KP(111);
    pass_on_hits(seg, twin, original);
    bool same = !slot_changed(original->slot, original->word) || MUTANT(19);
    KP(118); /* evicted from here on, it leaves a twin that is a miss */
    bool joined = same && slot_replace(ctx, twin->pool, twin->slot, &twin->word,
                                       slot_next(twin->word, SLOT_TWIN, slot_number(seg, original->slot)) | bits);
    KP(112);
    if (!MUTANT(21))
        twins_unlock(seg);
    if (joined) {
        atomic_fetch_add_explicit(&seg->super->twins, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&seg->super->twin_bytes, saved, memory_order_relaxed);
    }
    return joined;
}

/* Ephemeral pages that the first get takes out do not: they are gone soon anyway. */
static bool takes_part(const struct tm_pool *p) { return p->persistent || !p->exclusive; }

/* The page of slot `number`, or of its original if it is a twin, if it has its originals where `originals` says. */
static bool find_other(struct tm_ctx *ctx, struct tm_twins *t, uint32_t originals, uint64_t number, struct view *v)
{
    struct tm_segment *seg = ctx->seg;
    int pool = slot_pool(seg, number);
    if (pool < 0 || originals_of(seg, (uint32_t)pool) != originals || !takes_part(&seg->pools[pool]))
        return false;
    *v = (struct view){(uint32_t)pool, at(seg, number * 8), 0};
    v->word = atomic_load(v->slot);
    if (slot_type(v->word) == SLOT_TWIN && !is_originals(v->pool)) {
        v->slot = twin_original(seg, v->pool, v->word);
        v->pool = originals;
        if (!v->slot)
            return false;
        v->word = atomic_load(v->slot);
    }
    return look(ctx, v, t->other);
}

/* Share the page of `one`, which is in t->page, with that of slot `number`, if they are equal. True: from now on `number`
 * is the slot to compare others with; it is set to the original's. */
static bool share(struct tm_ctx *ctx, struct tm_twins *t, struct view *one, uint64_t *number)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t originals = originals_of(seg, one->pool);
    struct view other, original;
    if (!find_other(ctx, t, originals, *number, &other) || (memcmp(t->page, t->other, TM_PAGE) != 0 && !MUTANT(20)))
        return false;
    if (is_originals(one->pool) || is_originals(other.pool)) {
        original = is_originals(one->pool) ? *one : other;
        if (!is_originals(one->pool) || !is_originals(other.pool))
            join(ctx, is_originals(one->pool) ? &other : one, &original);
    } else {
        uint32_t form = block_form(atomic_load(&block_at(seg, one->word & SLOT_VALUE)->word));
        uint64_t hits = hits_of(seg, one), others = hits_of(seg, &other);
        if (!make_original(ctx, t, originals, form, hits > others ? hits : others, &original))
            return true; /* there is no room now */
        atomic_fetch_sub_explicit(&seg->super->twin_bytes, stride_at(seg, original.word & SLOT_VALUE), memory_order_relaxed);
        bool first = join(ctx, &other, &original);
        KP(113);
        if (!join(ctx, one, &original) && !first)
            note_orphans(seg, ORPHAN_ORIGINALS); /* for the next look */
    }
    *number = slot_number(seg, original.slot);
    return true;
}

/* Of a page among those of the same originals. */
static uint64_t hash_of(const uint8_t *page, uint32_t originals)
{
    uint64_t hash = codec_checksum(page, TM_PAGE) + originals * UINT64_C(0x9e3779b97f4a7c15);
#ifdef TM_KILL_POINTS
    hash &= 63; /* so that pages which differ are compared */
#endif
    return hash;
}

/* The place for a page with this checksum: that of an equal one, or a free one, or any. */
static struct seen *remembered(struct tm_twins *t, uint64_t hash)
{
    struct seen *ways = &t->pages[hash & t->mask & ~(uint64_t)(WAYS - 1)], *place = &ways[hash >> 60 & (WAYS - 1)];
    for (unsigned i = 0; i < WAYS; i++)
        if (ways[i].slot && ways[i].hash == hash)
            return &ways[i];
    for (unsigned i = 0; i < WAYS; i++)
        if (!ways[i].slot)
            place = &ways[i];
    return place;
}

static bool visit_slot(struct tm_ctx *ctx, void *memory, uint32_t pool, uint64_t number, bool warm)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_twins *t = memory;
    struct view one = {pool, at(seg, number * 8), atomic_load_explicit((slot_t *)at(seg, number * 8), memory_order_acquire)};
    uint64_t block = one.word & SLOT_VALUE;
    if (slot_type(one.word) != SLOT_BLOCK || !in_data(seg, block * 16) || (!warm && block_is_warm(seg, block)))
        return false;
    uint32_t mark = (uint32_t)(((one.word & ~SLOT_FREQ) ^ number << 20) * UINT64_C(0x9fb21c651e98df25) >> 32) | 1;
    uint32_t *marked = &t->marks[number & t->mask];
    if (*marked == mark)
        return false; /* seen, and not changed since */
    *marked = mark;
    if (!look(ctx, &one, t->page))
        return true;
    uint64_t hash = hash_of(t->page, originals_of(seg, pool));
    struct seen *place = remembered(t, hash);
    if (!place->slot || place->hash != hash || (place->slot != number && !share(ctx, t, &one, &place->slot)))
        *place = (struct seen){hash, number};
    return true;
}

/* May equal pages of this pool be kept once? Inside an operation: whoever destroys it, or its originals, waits for us. */
static bool may_share(struct tm_segment *seg, uint32_t pool)
{
    const struct tm_pool *p = &seg->pools[pool];
    uint32_t client = payer_of(seg, pool);
    return atomic_load(&p->state) == LIVE && takes_part(p) && !p->link && !is_packs(pool)
           && atomic_load(&seg->clients[client].state) == LIVE && atomic_load(&seg->clients[client].dedup)
           && !phase_of(seg, client) && atomic_load(&seg->pools[originals_of(seg, pool)].state) == LIVE;
}

/* Each client that wants it has pools of originals, and so has each shared pool that is its own. True if there is one. */
static bool prepare(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    bool any = false;
    for (uint32_t id = 0; id < TM_MAX_CLIENTS; id++) {
        uint32_t serial = atomic_load(&seg->clients[id].serial), pool, pool_serial;
        if (atomic_load(&seg->clients[id].state) != LIVE || !atomic_load(&seg->clients[id].dedup))
            continue;
        for (int ephemeral = 0; ephemeral < 2; ephemeral++) {
            struct pool_wish wish = {.persistent = !ephemeral, .id = (int)TM_USER_POOLS + ephemeral};
            if (atomic_load(&seg->pools[id * TM_CLIENT_POOLS + (uint32_t)wish.id].state) == FREE)
                pool_new(ctx, id, serial, &wish, &pool, &pool_serial);
        }
        any = true;
    }
    for (uint32_t p = TM_FIRST_SHARED; p < TM_FIRST_SHARED_ORIGINALS; p++)
        if (atomic_load(&seg->pools[p].state) == LIVE && atomic_load(&seg->clients[payer_of(seg, p)].dedup)
            && atomic_load(&seg->pools[p + TM_MAX_SHARED].state) == FREE)
            pool_new_originals(ctx, p);
    return any;
}

void twins_free(struct tm_segment *seg)
{
    struct tm_twins *t = seg->pairing.memory;
    if (t) {
        free(t->pages);
        free(t->marks);
        free(t);
    }
}

static void *make_twins(const struct tm_segment *seg)
{
    uint64_t size = 1024;
    void *made = NULL;
    while (size < MOST && size < (uint64_t)seg->nchunks * (TM_CHUNK / 1024))
        size *= 2;
    if (posix_memalign(&made, 64, sizeof(struct tm_twins)))
        return NULL;
    struct tm_twins *t = memset(made, 0, sizeof *t);
    t->mask = (uint32_t)size - 1;
    t->pages = calloc(size, sizeof *t->pages);
    t->marks = calloc(size, sizeof *t->marks);
    if (t->pages && t->marks)
        return t;
    free(t->pages);
    free(t->marks);
    free(t);
    return NULL;
}

uint64_t tm_dedup(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns)
{
    static const struct tm_walk walk = {.step = 1, .may = may_share, .makes_in = originals_of, .visit = visit_slot};
    struct tm_segment *seg = ctx->seg;
    uint64_t began = timing_cpu(), place = 0;
    struct tm_twins *t = prepare(ctx) ? pass_begin(seg, &seg->pairing, make_twins) : NULL;
    if (t)
        place = pass_walk(ctx, &walk, t, first, time_after(began, most_ns), warm);
    if (!place)
        twins_sweep(ctx);
    if (t) {
        if (!place && ++t->rounds % ROUNDS == 0)
            memset(t->marks, 0, (t->mask + 1) * sizeof *t->marks);
        pass_end(&seg->pairing);
    }
    *spent_ns = timing_cpu() - began;
    atomic_fetch_add_explicit(&seg->super->twin_ns, *spent_ns, memory_order_relaxed);
    return place;
}
