/* Twins: equal pages of one client, kept once.
 *
 * What several slots share is not a block but a page: the ORIGINAL, which has a slot of its own in a pool of the core's
 * (originals_of), and so a block, a tier, a repair as any page has. A TWIN is a slot that names the original's slot.
 * One slot still owns one block, and nobody counts who refers to an original: as with locations in a tier (demote.c)
 * the slots are the only truth, and an original goes when a look at all of them has found none that names it.
 *
 * The two that must not meet are making a slot a twin and removing originals without any: both hold `twin_lock`, which is
 * robust, only ever tried, and guards no data, so a death there leaves nothing to do. Under it a twin is made only if
 * its original still is as it was when the two pages were compared, byte for byte; and what a look has not found named
 * cannot be named before the lock is dropped. Everything else goes on meanwhile: a twin that is put or flushed
 * becomes something else by its own swap, and leaves an original for the next look.
 *
 * A reader looks at the twin's slot again after it has read the original. If the slot is as it was, it named the
 * original all the time, which therefore stayed. Reading is done inside an operation, so no leaf goes under it.
 *
 * Only the manager's pass makes twins, of persistent pages that nobody used lately, of clients that allow it. It
 * remembers checksums of the pages that it has seen, in memory of its own; what it forgets costs only twins. */
#include "tm.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum {
    WAYS = 4,           /* pages that are remembered for the same low bits of their checksums */
    MOST = 1 << 20,     /* pages that are remembered in all: 20 MiB of the manager's memory */
    ROUNDS = 16,        /* after so many every page is looked at again: what was forgotten, or could not be done */
    LEAVES = 64,        /* of originals, that are looked after in one look at all slots: a bit each for 512 of them */
    FREE_TRIES = 64,    /* slots for a new original that are looked at */
    PATIENCE = 1000     /* times that a put that needs memory tries to get the lock */
};

struct seen { /* a page of some client */
    uint64_t hash, slot; /* slot number; 0: none */
};

struct tm_twins {
    _Atomic uint32_t busy; /* one pass at a time in this process */
    uint32_t mask, rounds;
    struct seen *pages;    /* by checksum */
    uint32_t *marks;       /* by slot: which word of it was looked at */
    uint32_t hand[TM_MAX_CLIENTS]; /* index at which the next original may find room */
    _Alignas(64) uint8_t page[TM_PAGE], other[TM_PAGE], packed[TM_SCRATCH];
};

bool is_originals(uint32_t pool) { return pool < TM_FIRST_SHARED && pool % TM_CLIENT_POOLS == TM_USER_POOLS; }

uint32_t originals_of(uint32_t pool) { return pool / TM_CLIENT_POOLS * TM_CLIENT_POOLS + TM_USER_POOLS; }

static bool changed(slot_t *slot, uint64_t word) { return ((atomic_load(slot) ^ word) & ~SLOT_FREQ) != 0; }

slot_t *twin_original(struct tm_segment *seg, uint32_t pool, uint64_t word)
{
    uint64_t number = word & SLOT_VALUE;
    return pool < TM_FIRST_SHARED && slot_pool(seg, number) == (int)originals_of(pool) ? at(seg, number * 8) : NULL;
}

int twin_get(struct tm_ctx *ctx, uint32_t pool, uint64_t word, uint8_t *page)
{
    slot_t *original = twin_original(ctx->seg, pool, word);
    return original ? slot_get(ctx, originals_of(pool), original, page, NULL) : TM_CORRUPT;
}

static bool take(struct tm_segment *seg) { return lock_try_life(&seg->super->twin_lock) != LIFE_TAKEN; }
static void drop(struct tm_segment *seg) { lock_drop(&seg->super->twin_lock); }

/* ---- Originals that no slot names ------------------------------------------------------------------------- */

struct leaves { /* some of a client's originals, in ascending order */
    uint32_t n;
    uint64_t first[LEAVES], end[LEAVES]; /* slot numbers */
};

/* Call `each` for every allocated leaf of pools first..last-1 from chunk `*c` and unit `*bit` on, until it returns false;
 * where to go on, nchunks at the end. Inside an operation. */
static void each_leaf(struct tm_segment *seg, uint32_t first, uint32_t last, uint32_t *c, uint32_t *bit, void *arg,
                      bool (*each)(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end))
{
    for (; *c < seg->nchunks; ++*c, *bit = 0) {
        const struct tm_chunk *d = &seg->chunks[*c];
        uint32_t bin = d->bin;
        if (atomic_load(&seg->states[*c]) != CHUNK_USED || bin < BIN_LEAF + first * 3 || bin >= BIN_LEAF + last * 3)
            continue;
        uint32_t stride = bin_stride(bin);
        for (; *bit < TM_CHUNK / stride; ++*bit) {
            uint64_t from = (seg->data_offset + (uint64_t)*c * TM_CHUNK + (uint64_t)*bit * stride) / 8;
            if (bit_is_set(d, *bit) && !each(seg, arg, from, from + stride / 8))
                return;
        }
    }
}

/* Is the leaf still one of originals? Found by its chunk it may have been given back meanwhile, but not one that holds
 * a page: that has to go first, and then whoever frees the leaf waits for us. */
static bool is_leaf_of(struct tm_segment *seg, uint32_t originals, uint64_t from, uint64_t end)
{
    uint32_t c = chunk_of(seg, from * 8), stride = (uint32_t)(end - from) * 8;
    if (slot_pool(seg, from) != (int)originals || bin_stride(seg->chunks[c].bin) != stride)
        return false;
    uint64_t within = from * 8 - seg->data_offset - (uint64_t)c * TM_CHUNK;
    return within % stride == 0 && bit_is_set(&seg->chunks[c], (uint32_t)within / stride);
}

static bool gather(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end)
{
    struct leaves *l = arg;
    if (l->n == LEAVES)
        return false;
    for (uint64_t i = from; i < end; i++)
        if (slot_stored(atomic_load_explicit((slot_t *)at(seg, i * 8), memory_order_acquire))) {
            l->first[l->n] = from;
            l->end[l->n++] = end;
            break;
        }
    return true;
}

struct named {
    const struct leaves *leaves;
    uint8_t *bits; /* of a page: 512 for each leaf */
};

static bool note_named(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end)
{
    const struct named *n = arg;
    const struct leaves *l = n->leaves;
    for (uint64_t i = from; i < end; i++) {
        uint64_t word = atomic_load_explicit((slot_t *)at(seg, i * 8), memory_order_acquire), named = word & SLOT_VALUE;
        if (slot_type(word) != SLOT_TWIN)
            continue;
        uint32_t low = 0, high = l->n; /* the last leaf that begins at it or before */
        while (high - low > 1)
            *(l->first[(low + high) / 2] <= named ? &low : &high) = (low + high) / 2;
        if (named >= l->first[low] && named < l->end[low]) {
            uint64_t bit = low * 512 + (named - l->first[low]);
            n->bits[bit / 8] |= (uint8_t)(1u << bit % 8);
        }
    }
    return true;
}

/* Remove the originals of the client that no slot names, those of some leaves from chunk `*c` and unit `*bit` on; the
 * number. Inside an operation, with the lock held. */
static uint32_t sweep(struct tm_ctx *ctx, uint32_t client, uint32_t *c, uint32_t *bit)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t first = client * TM_CLIENT_POOLS, originals = originals_of(first), freed = 0;
    struct leaves l = {0};
    struct named named = {&l, ctx->moved};
    each_leaf(seg, originals, originals + 1, c, bit, &l, gather);
    if (!l.n)
        return 0;
    memset(ctx->moved, 0, TM_PAGE);
    uint32_t from_c = 0, from_bit = 0;
    each_leaf(seg, first, originals, &from_c, &from_bit, &named, note_named);
    KP(114);
    for (uint32_t i = 0; i < l.n; i++)
        for (uint64_t at_slot = l.first[i]; at_slot < l.end[i]; at_slot++) {
            uint64_t n = i * 512 + (at_slot - l.first[i]);
            slot_t *slot = at(seg, at_slot * 8);
            if (!(named.bits[n / 8] >> n % 8 & 1) && is_leaf_of(seg, originals, l.first[i], l.end[i])
                && slot_stored(atomic_load(slot))) {
                freed += (uint32_t)slot_flush(ctx, originals, slot, SLOT_EMPTY);
                KP(115);
            }
        }
    if (freed)
        look_for_empty(seg);
    return freed;
}

static bool has_originals(struct tm_segment *seg, uint32_t client)
{
    const struct tm_pool *p = &seg->pools[originals_of(client * TM_CLIENT_POOLS)];
    return atomic_load(&p->state) == LIVE && atomic_load(&p->pages) > 0;
}

/* All originals without twins, of everybody. */
static void sweep_all(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    if (!take(seg))
        return;
    atomic_store(&seg->super->orphans, 0);
    for (uint32_t client = 0; client < TM_MAX_CLIENTS; client++)
        for (uint32_t c = has_originals(seg, client) ? 0 : seg->nchunks, bit = 0; c < seg->nchunks;) {
            op_begin(ctx);
            sweep(ctx, client, &c, &bit);
            op_end(ctx);
        }
    drop(seg);
}

bool twin_rescue(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t freed = 0;
    if (!atomic_load_explicit(&seg->super->orphans, memory_order_relaxed) || MUTANT(22))
        return false;
    for (unsigned tries = 0; !take(seg); tries++) {
        if (tries == PATIENCE)
            return false;
        sched_yield();
    }
    atomic_store(&seg->super->orphans, 0);
    for (uint32_t client = 0; client < TM_MAX_CLIENTS && !freed; client++)
        for (uint32_t c = has_originals(seg, client) ? 0 : seg->nchunks, bit = 0; c < seg->nchunks && !freed;)
            freed += sweep(ctx, client, &c, &bit);
    if (freed) /* there may be more where we stopped */
        atomic_store(&seg->super->orphans, 1);
    drop(seg);
    return freed;
}

/* ---- The pass --------------------------------------------------------------------------------------------- */

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
           && !changed(v->slot, v->word);
}

/* A new original of the client with the page `t->page`, stored as `kind`, if there is room without evicting anything. */
static bool make_original(struct tm_ctx *ctx, struct tm_twins *t, uint32_t client, enum block_kind kind, struct view *v)
{
    struct tm_segment *seg = ctx->seg;
    static const uint64_t oid[3];
    struct cursor cur = {0};
    uint32_t *hand = &t->hand[client];
    v->pool = originals_of(client * TM_CLIENT_POOLS);
    for (unsigned tries = 0;; tries++, ++*hand) {
        if (*hand > 2 * atomic_load(&seg->pools[v->pool].pages) + 2 * FREE_TRIES)
            *hand = 0;
        if (tries == FREE_TRIES || cursor_create(ctx, v->pool, oid, *hand, &cur) != TM_OK)
            return false;
        v->slot = &cur.slots[*hand - cur.first];
        v->word = atomic_load(v->slot);
        if (slot_type(v->word) == SLOT_EMPTY && slot_number(seg, v->slot) <= SLOT_VALUE)
            break;
    }
    const uint8_t *payload = t->packed;
    uint32_t length = kind == BLOCK_ZSTD ? codec_condense(ctx, t->page, t->packed)
                      : kind == BLOCK_LZ4 ? codec_compress(ctx, t->page, t->packed) : TM_PAGE;
    if (length == TM_PAGE) {
        kind = BLOCK_RAW;
        payload = t->page;
    }
    uint32_t bin = BIN_PERSISTENT + size_class(length);
    uint64_t block = block_spare(ctx, bin);
    if (!block)
        return false;
    block_write(block_at(seg, block), slot_number(seg, v->slot), kind, length, payload);
    uint64_t next = slot_next(v->word, SLOT_BLOCK, block);
    if (!slot_replace(ctx, v->pool, v->slot, &v->word, next)) {
        block_free_new(ctx);
        return false;
    }
    v->word = next;
    KP(110);
    return true;
}

/* Make the slot of `twin` name `original`, which has the same page, if both are as they were seen. */
static bool join(struct tm_ctx *ctx, struct view *twin, const struct view *original)
{
    struct tm_segment *seg = ctx->seg;
    int64_t saved = stride_at(seg, twin->word & SLOT_VALUE);
    if (!MUTANT(21) && !take(seg))
        return false;
    KP(111);
    bool joined = (!changed(original->slot, original->word) || MUTANT(19))
                  && slot_replace(ctx, twin->pool, twin->slot, &twin->word,
                                  slot_next(twin->word, SLOT_TWIN, slot_number(seg, original->slot)) | (twin->word & SLOT_FREQ));
    KP(112);
    if (!MUTANT(21))
        drop(seg);
    if (joined) {
        atomic_fetch_add_explicit(&seg->super->twins, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&seg->super->twin_bytes, saved, memory_order_relaxed);
    }
    return joined;
}

/* The page of slot `number`, or of its original if it is a twin, if that may be shared with the client's others. */
static bool find_other(struct tm_ctx *ctx, struct tm_twins *t, uint32_t client, uint64_t number, struct view *v)
{
    struct tm_segment *seg = ctx->seg;
    int pool = slot_pool(seg, number);
    if (pool < 0 || (uint32_t)pool / TM_CLIENT_POOLS != client || !seg->pools[pool].persistent)
        return false;
    *v = (struct view){(uint32_t)pool, at(seg, number * 8), 0};
    v->word = atomic_load(v->slot);
    if (slot_type(v->word) == SLOT_TWIN && !is_originals(v->pool)) {
        v->slot = twin_original(seg, v->pool, v->word);
        v->pool = originals_of(v->pool);
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
    uint32_t client = one->pool / TM_CLIENT_POOLS;
    struct view other, original;
    if (!find_other(ctx, t, client, *number, &other) || (memcmp(t->page, t->other, TM_PAGE) != 0 && !MUTANT(20)))
        return false;
    if (is_originals(one->pool) || is_originals(other.pool)) {
        original = is_originals(one->pool) ? *one : other;
        if (!is_originals(one->pool) || !is_originals(other.pool))
            join(ctx, is_originals(one->pool) ? &other : one, &original);
    } else {
        enum block_kind kind = block_kind(atomic_load(&block_at(seg, one->word & SLOT_VALUE)->word));
        if (!make_original(ctx, t, client, kind, &original))
            return true; /* there is no room now */
        atomic_fetch_sub_explicit(&seg->super->twin_bytes, stride_at(seg, original.word & SLOT_VALUE), memory_order_relaxed);
        bool first = join(ctx, &other, &original);
        KP(113);
        if (!join(ctx, one, &original) && !first)
            atomic_store(&seg->super->orphans, 1); /* for the next look */
    }
    *number = slot_number(seg, original.slot);
    return true;
}

static uint64_t hash_of(const uint8_t *page, uint32_t client)
{
    uint64_t hash = codec_checksum(page, TM_PAGE) + client * UINT64_C(0x9e3779b97f4a7c15);
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

/* Was it put or got since the pass of dense.c came by for the last time but one? */
static bool is_warm(struct tm_segment *seg, uint64_t block)
{
    uint64_t within = block * 16 - seg->data_offset, bit = UINT64_C(1) << (within % TM_CHUNK / 1024);
    const struct tm_touched *touched = &seg->touched[within / TM_CHUNK];
    return ((atomic_load_explicit(&touched->now, memory_order_relaxed)
             | atomic_load_explicit(&touched->before, memory_order_relaxed)) & bit) != 0;
}

static void visit_slot(struct tm_ctx *ctx, struct tm_twins *t, uint32_t pool, uint64_t number, bool warm)
{
    struct tm_segment *seg = ctx->seg;
    struct view one = {pool, at(seg, number * 8), atomic_load_explicit((slot_t *)at(seg, number * 8), memory_order_acquire)};
    uint64_t block = one.word & SLOT_VALUE;
    if (slot_type(one.word) != SLOT_BLOCK || !in_data(seg, block * 16) || (!warm && is_warm(seg, block)))
        return;
    uint32_t mark = (uint32_t)(((one.word & ~SLOT_FREQ) ^ number << 20) * UINT64_C(0x9fb21c651e98df25) >> 32) | 1;
    uint32_t *marked = &t->marks[number & t->mask];
    if (*marked == mark)
        return; /* seen, and not changed since */
    *marked = mark;
    if (!look(ctx, &one, t->page))
        return;
    uint64_t hash = hash_of(t->page, pool / TM_CLIENT_POOLS);
    struct seen *place = remembered(t, hash);
    if (!place->slot || place->hash != hash || (place->slot != number && !share(ctx, t, &one, &place->slot)))
        *place = (struct seen){hash, number};
}

/* May equal pages of this pool be kept once? Inside an operation: whoever destroys it, or its originals, waits for us. */
static bool may_share(struct tm_segment *seg, uint32_t pool)
{
    uint32_t client = pool / TM_CLIENT_POOLS;
    const struct tm_pool *p = &seg->pools[pool];
    return pool < TM_FIRST_SHARED && atomic_load(&p->state) == LIVE && p->persistent && !p->link
           && atomic_load(&seg->clients[client].state) == LIVE && atomic_load(&seg->clients[client].dedup)
           && !phase_of(seg, client) && atomic_load(&seg->pools[originals_of(pool)].state) == LIVE;
}

/* Visit the leaves of one chunk; false if the time was over before the last. */
static bool visit(struct tm_ctx *ctx, struct tm_twins *t, uint32_t c, bool warm, uint64_t began_ns, uint64_t most_ns)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = d->bin;
    if (atomic_load(&seg->states[c]) != CHUNK_USED || bin < BIN_LEAF)
        return true;
    uint32_t pool = (bin - BIN_LEAF) / 3, stride = bin_stride(bin);
    for (uint32_t bit = 0; bit < TM_CHUNK / stride && may_share(seg, pool); bit++) {
        if (!bit_is_set(d, bit))
            continue;
        op_begin(ctx);
        ctx->client = ctx->payer = pool / TM_CLIENT_POOLS;
        ctx->pool = originals_of(pool);
        uint64_t from = (seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride) / 8;
        for (uint32_t i = 0; i < stride / 8 && may_share(seg, pool) && slot_pool(seg, from) == (int)pool; i++)
            visit_slot(ctx, t, pool, from + i, warm);
        op_end(ctx);
        if (c && timing_cpu() - began_ns > most_ns) /* of the first chunk 0 would say that all is done */
            return false; /* what was seen is passed by quickly the next time */
    }
    return true;
}

/* Each client that wants it has a pool of originals. True if there is one. */
static bool prepare(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    bool any = false;
    for (uint32_t id = 0; id < TM_MAX_CLIENTS; id++) {
        uint32_t serial = atomic_load(&seg->clients[id].serial), pool, pool_serial;
        if (atomic_load(&seg->clients[id].state) != LIVE || !atomic_load(&seg->clients[id].dedup))
            continue;
        struct pool_wish wish = {.persistent = true, .id = TM_USER_POOLS};
        if (atomic_load(&seg->pools[originals_of(id * TM_CLIENT_POOLS)].state) == FREE)
            pool_new(ctx, id, serial, &wish, &pool, &pool_serial);
        any = true;
    }
    return any;
}

void twins_free(struct tm_segment *seg)
{
    struct tm_twins *t = atomic_load(&seg->twins);
    if (t) {
        free(t->pages);
        free(t->marks);
        free(t);
    }
}

/* What this process remembers; made when it is first needed. NULL: no memory, or another thread has it. */
static struct tm_twins *twins_of(struct tm_segment *seg)
{
    struct tm_twins *t = atomic_load(&seg->twins), *none = NULL;
    uint32_t unused = 0;
    if (!t) {
        uint64_t size = 1024;
        while (size < MOST && size < (uint64_t)seg->nchunks * (TM_CHUNK / 1024))
            size *= 2;
        void *made = NULL;
        if (posix_memalign(&made, 64, sizeof *t))
            return NULL;
        t = memset(made, 0, sizeof *t);
        t->mask = (uint32_t)size - 1;
        t->pages = calloc(size, sizeof *t->pages);
        t->marks = calloc(size, sizeof *t->marks);
        if (!t->pages || !t->marks || !atomic_compare_exchange_strong(&seg->twins, &none, t)) {
            free(t->pages);
            free(t->marks);
            free(t);
            return NULL;
        }
    }
    return atomic_compare_exchange_strong(&t->busy, &unused, 1) ? t : NULL;
}

uint32_t tm_dedup(struct tm_ctx *ctx, uint32_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t began = timing_cpu();
    uint32_t c = first;
    struct tm_twins *t = prepare(ctx) ? twins_of(seg) : NULL;
    for (; t && c < seg->nchunks; c++)
        if (!visit(ctx, t, c, warm, began, most_ns))
            break;
    if (!t || c == seg->nchunks) {
        c = 0;
        sweep_all(ctx);
    }
    if (t) {
        if (!c && ++t->rounds % ROUNDS == 0)
            memset(t->marks, 0, (t->mask + 1) * sizeof *t->marks);
        atomic_store(&t->busy, 0);
    }
    *spent_ns = timing_cpu() - began;
    atomic_fetch_add_explicit(&seg->super->twin_ns, *spent_ns, memory_order_relaxed);
    return c;
}
