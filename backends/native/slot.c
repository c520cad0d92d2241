/* put, get and flush of one page, at its slot and inside an operation.
 *
 * The order of every change: write the block, swap the slot, free the old block. Whoever swaps a block's reference
 * out of its slot owns that block. Before the swap the old block stands in our intent, with its stamp. */
#include "tm.h"

bool slot_stored(uint64_t word)
{
    unsigned type = slot_type(word);
    return type == SLOT_BLOCK || type == SLOT_FILL || type == SLOT_TIER || type == SLOT_TWIN
           || type == SLOT_PACKED;
}

static int64_t add(_Atomic int64_t *counter, int64_t n)
{
    return n ? atomic_fetch_add_explicit(counter, n, memory_order_relaxed) + n
             : atomic_load_explicit(counter, memory_order_relaxed);
}

/* A maximum; between two threads the lesser may win for a moment. */
static void raise_to(_Atomic int64_t *most, int64_t n)
{
    if (n > atomic_load_explicit(most, memory_order_relaxed))
        atomic_store_explicit(most, n, memory_order_relaxed);
}

struct change { /* of a pool's sums by one commit */
    int64_t pages, fill, raw, tier, twin, packed, bytes;
};

static void tally(struct tm_segment *seg, uint64_t word, int sign, struct change *sum)
{
    unsigned type = slot_type(word);
    if (type == SLOT_FILL) {
        sum->pages += sign;
        sum->fill += sign;
    } else if (type == SLOT_TIER) {
        sum->pages += sign;
        sum->tier += sign;
    } else if (type == SLOT_TWIN) {
        sum->pages += sign;
        sum->twin += sign;
    } else if (type == SLOT_PACKED) {
        sum->pages += sign;
        sum->packed += sign;
    } else if (type == SLOT_BLOCK) {
        uint32_t size = stride_at(seg, word & SLOT_VALUE);
        sum->pages += sign;
        sum->bytes += sign * (int64_t)size;
        sum->raw += size == TM_STRIDE_RAW ? sign : 0;
    }
}

static void account(struct tm_segment *seg, uint32_t pool, const struct change *sum)
{
    struct tm_pool *p = &seg->pools[pool];
    struct tm_client *who = &seg->clients[account_of(pool)];
    raise_to(&p->pages_most, add(&p->pages, sum->pages));
    if (!p->persistent && !is_originals(pool))
        raise_to(&who->ephemeral_most, add(&who->ephemeral, sum->pages));
    add(&p->fill_pages, sum->fill);
    add(&p->raw_pages, sum->raw);
    add(&p->tier_pages, sum->tier);
    add(&p->twin_pages, sum->twin);
    add(&p->packed_pages, sum->packed);
    add(&p->bytes, sum->bytes);
    add(&who->used_bytes, sum->bytes);
}

/* The block that `word` in `slot` refers to, if it is this slot's to free; 0 if not. A flipped bit in the slot must
 * not lead us to another page's block, or out of the segment. Where the block's header names another slot, that slot
 * is asked: if it refers to the block, our slot is the damaged one, else the header. A block that was freed this
 * moment may look like either, but then the slot has changed and our swap fails. */
static uint64_t block_of(struct tm_segment *seg, const slot_t *slot, uint64_t word)
{
    uint64_t block = word & SLOT_VALUE;
    if (slot_type(word) != SLOT_BLOCK || !in_data(seg, block * 16)
        || !bin_is_block(seg->chunks[chunk_of(seg, block * 16)].bin))
        return 0;
    uint64_t header = atomic_load_explicit(&block_at(seg, block)->word, memory_order_acquire);
    uint64_t number = header_slot(header);
    if (number == slot_number(seg, slot))
        return block;
    uint32_t c, bit;
    bool other = slot_pool(seg, number) >= 0 && slot_refers(atomic_load((slot_t *)at(seg, number * 8)), block);
    return !other && block_place(seg, block, &c, &bit) && bit_is_set(&seg->chunks[c], bit) ? block : 0;
}

/* Note the block that we are about to take out of its slot, if there is one. False, and `*old` is what is there now: the
 * slot has changed, so that what we found as the block's stamp may be that of whose new block it is by now. */
static bool intend_old(struct tm_ctx *ctx, const slot_t *slot, uint64_t *old, uint64_t block)
{
    if (block) {
        uint32_t stamp = atomic_load_explicit(&block_at(ctx->seg, block)->stamp, memory_order_acquire);
        uint64_t now = atomic_load_explicit(slot, memory_order_acquire);
        if (now != *old && !MUTANT(39)) {
            *old = now;
            return false;
        }
        atomic_store_explicit(&ctx->rec->old_stamp, stamp, memory_order_relaxed);
    }
    atomic_store_explicit(&ctx->rec->old_block, block, memory_order_release);
    KP(40);
    return true;
}

/* Swap `old` for `new`. On success the old block is accounted for and freed; else `*old` is what is there now. */
bool slot_replace(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t *old, uint64_t new)
{
    struct change sum = {0};
    uint64_t block = block_of(ctx->seg, slot, *old);
    if (!intend_old(ctx, slot, old, block))
        return false;
    tally(ctx->seg, new, 1, &sum); /* before the swap: after it the page may be evicted, its chunk another bin's */
    if (MUTANT(5))
        atomic_store(slot, new);
    else if (!atomic_compare_exchange_strong_explicit(slot, old, new, memory_order_acq_rel, memory_order_acquire)) {
        atomic_store_explicit(&ctx->rec->old_block, 0, memory_order_release);
        return false;
    }
    KP(41);
    atomic_store_explicit(&ctx->rec->new_block, 0, memory_order_release);
    KP(42);
    if (block || slot_type(*old) != SLOT_BLOCK) {
        tally(ctx->seg, *old, -1, &sum);
    } else { /* a damaged slot: how large its block was is not known, so the reaper counts anew */
        sum.pages--;
        atomic_store(&ctx->seg->super->recount, 1);
    }
    account(ctx->seg, pool, &sum);
    KP(47);
    if (!MUTANT(17))
        note_change(ctx);
    if (block)
        block_free_old(ctx);
    else if (slot_type(*old) == SLOT_TWIN)
        note_orphans(ctx->seg, ORPHAN_ORIGINALS);
    else if (slot_type(*old) == SLOT_PACKED)
        pack_left(ctx, pool, slot, *old);
    KP(43);
    return true;
}

/* What stays of a page that goes: of one that was exported, that it is gone; of an original, that it was here. */
static uint64_t empty_word(struct tm_segment *seg, uint32_t pool, uint64_t old)
{
    bool gone = seg->pools[pool].persistent && (old & SLOT_FREQ) && phase_of(seg, pool / TM_CLIENT_POOLS);
    return slot_next(old, SLOT_EMPTY, gone && !MUTANT(7) ? SLOT_GONE : original_trace(seg, pool, 0));
}

int slot_flush(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, unsigned type)
{
    uint64_t old = atomic_load_explicit(slot, memory_order_acquire);
    for (;;) {
        if (slot_type(old) == SLOT_DEAD || (type == SLOT_EMPTY && !slot_stored(old)))
            return 0;
        int had = slot_stored(old);
        uint64_t next = type == SLOT_EMPTY ? empty_word(ctx->seg, pool, old) : slot_next(old, type, 0);
        if (slot_replace(ctx, pool, slot, &old, next)) {
            if (had)
                count(ctx->seg, pool, C_FLUSHED, 1);
            return had;
        }
    }
}

/* What the pool's memory grows by if the slot's page is replaced by one of `size`. Asked anew whenever something was
 * evicted: that may have been the slot's own page. */
static int64_t growth(struct tm_segment *seg, const slot_t *slot, int64_t size)
{
    uint64_t old = atomic_load_explicit(slot, memory_order_relaxed), block = old & SLOT_VALUE;
    return slot_type(old) == SLOT_BLOCK && in_data(seg, block * 16) ? size - stride_at(seg, block) : size;
}

/* The block, unless it had to be so large that it goes beyond the cap: then 0, and it is freed. */
static uint64_t within_cap(struct tm_ctx *ctx, const slot_t *slot, bool capped, uint64_t block)
{
    struct tm_segment *seg = ctx->seg;
    if (!block || !capped || has_cap_for(seg, ctx->payer, growth(seg, slot, stride_at(seg, block))))
        return block;
    block_free_new(ctx);
    return 0;
}

/* Where the next version of an ephemeral page belongs: a page that was evicted lately and comes again has proved
 * itself, and one that is put again stays where it was. */
static unsigned queue_for(struct tm_segment *seg, uint32_t pool, uint64_t old)
{
    if (slot_type(old) == SLOT_EMPTY)
        return ghost_is_fresh(seg, pool, old) ? QUEUE_MAIN : QUEUE_PROBATION;
    if (slot_type(old) == SLOT_TWIN) {
        const slot_t *original = twin_original(seg, pool, old);
        old = original ? atomic_load_explicit(original, memory_order_relaxed) : 0;
    }
    if (slot_type(old) != SLOT_BLOCK || !in_data(seg, (old & SLOT_VALUE) * 16))
        return QUEUE_PROBATION;
    uint32_t bin = seg->chunks[chunk_of(seg, (old & SLOT_VALUE) * 16)].bin;
    return bin_is_ephemeral(bin) && bin_queue(bin) == QUEUE_MAIN ? QUEUE_MAIN : QUEUE_PROBATION;
}

/* Memory for `length` bytes within the client's cap and what others were promised; sets intent new_block. 0: refused. */
static uint64_t room(struct tm_ctx *ctx, uint32_t pool, const slot_t *slot, uint32_t length)
{
    struct tm_segment *seg = ctx->seg;
    bool persistent = seg->pools[pool].persistent;
    unsigned queue = persistent ? 0 : queue_for(seg, pool, atomic_load_explicit(slot, memory_order_relaxed));
    uint32_t bin = persistent ? BIN_PERSISTENT + size_class(length)
                              : ephemeral_bin(seg, account_of(pool), queue, length);
    uint32_t client = ctx->payer;
    bool capped = atomic_load_explicit(&seg->clients[client].cap_bytes, memory_order_relaxed) != 0;
    int64_t size = bin_stride(bin);
    if (capped)
        for (unsigned tries = 0; !has_cap_for(seg, client, growth(seg, slot, size)); tries++)
            if (tries > 200 || !evict_chunk(ctx, (int)client, tries >= SOFT))
                return 0;
    for (unsigned tries = 0; !may_grow(seg, client, growth(seg, slot, size)); tries++)
        if (tries > 200 || (!evict_chunk(ctx, -1, tries >= SOFT) && !compact(ctx)))
            return 0;
    return within_cap(ctx, slot, capped, block_alloc(ctx, bin, ALLOC_NORMAL));
}

/* Not stored. Semantics D1: what was there must not be seen again, unless the caller asks for it. */
static int refuse(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, enum keep keep)
{
    struct tm_segment *seg = ctx->seg;
    if (slot_type(atomic_load_explicit(slot, memory_order_relaxed)) == SLOT_DEAD)
        return TM_AGAIN;
    if (keep == KEEP_NOTHING && slot_flush(ctx, pool, slot, SLOT_EMPTY)) {
        atomic_fetch_sub_explicit(&seg->pools[pool].counters[C_FLUSHED], 1, memory_order_relaxed);
        count(seg, pool, C_PUT_FLUSHED, 1);
    } else {
        count(seg, pool, C_REFUSED, 1);
    }
    return TM_REFUSED;
}

/* What the next word of a slot keeps: of an ephemeral page its hits; of a persistent one, has the other side of a
 * handoff an older version? Or else, that it was used. */
static uint64_t carried(const struct tm_segment *seg, uint32_t pool, uint64_t old)
{
    if (!seg->pools[pool].persistent)
        return slot_stored(old) ? old & SLOT_FREQ : 0;
    if (notes_use(seg, pool / TM_CLIENT_POOLS))
        return SLOT_FREQ_ONE;
    return (slot_stored(old) ? (old & SLOT_FREQ) != 0 : (old & SLOT_VALUE) != 0) ? SLOT_STALE : 0;
}

int slot_store(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, struct content *what, enum keep keep,
               const uint64_t *expected)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t old = atomic_load_explicit(slot, memory_order_acquire), block = 0;
    if (expected && ((old ^ *expected) & ~SLOT_FREQ))
        return TM_AGAIN;
    if (!what->fill) {
        if (keep == KEEP_IF_SPARE && !MUTANT(33)) {
            if (!(block = block_alloc(ctx, BIN_PERSISTENT + size_class(what->length), ALLOC_SPARE)))
                return TM_REFUSED;
        } else {
            block = room(ctx, pool, slot, what->length);
        }
        for (unsigned tries = 0; !block && tries < TM_RESCUES && twin_rescue(ctx); tries++)
            block = room(ctx, pool, slot, what->length);
        if (!block) {
            atomic_fetch_add_explicit(&seg->clients[ctx->payer].no_memory, 1, memory_order_relaxed);
            atomic_fetch_add_explicit(&seg->super->no_memory, 1, memory_order_relaxed);
            return refuse(ctx, pool, slot, keep);
        }
        KP(44);
        block_write(block_at(seg, block), slot_number(seg, slot), what->form, what->length, what->payload);
        KP(45);
        what->value = block;
        old = atomic_load_explicit(slot, memory_order_acquire);
    }
    for (;;) {
        if (slot_type(old) == SLOT_DEAD || (expected && ((old ^ *expected) & ~SLOT_FREQ))) {
            if (block)
                block_free_new(ctx);
            return TM_AGAIN;
        }
        bool had = slot_stored(old);
        uint64_t next = slot_next(old, what->fill ? SLOT_FILL : SLOT_BLOCK, what->value);
        if (slot_replace(ctx, pool, slot, &old, next | carried(seg, pool, old))) {
            if (block)
                note_touched(seg, block);
            count(seg, pool, C_STORED, 1);
            if (had)
                count(seg, pool, C_REPLACED, 1);
            return TM_OK;
        }
    }
}

/* What freeing the old block will touch arrives while we compress. */
static void prefetch_old(struct tm_segment *seg, const slot_t *slot)
{
    uint64_t old = atomic_load_explicit(slot, memory_order_relaxed);
    if (slot_type(old) != SLOT_BLOCK || !in_data(seg, (old & SLOT_VALUE) * 16))
        return;
    __builtin_prefetch(block_at(seg, old & SLOT_VALUE));
    __builtin_prefetch(&seg->chunks[chunk_of(seg, (old & SLOT_VALUE) * 16)], 1);
}

bool refuses_puts(const struct tm_ctx *ctx)
{
    return mode_of(ctx->seg, ctx->client) != MODE_ON || phase_of(ctx->seg, ctx->client) >= PHASE_FROZEN;
}

/* What the page is stored as, by what its client is set to and how much memory there is. */
static void encode(struct tm_ctx *ctx, uint32_t pool, const uint8_t *page, struct content *what)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t codec = atomic_load_explicit(&seg->clients[ctx->client].codec, memory_order_relaxed);
    what->length = TM_PAGE;
    what->form = BLOCK_RAW;
    what->payload = page;
    if (codec == CODEC_AUTO && !seg->pools[pool].persistent && memory_is_plentiful(seg, ctx->payer)) {
        what->form = BLOCK_LOOSE;
    } else if (codec != CODEC_NONE && (what->length = codec_compress(ctx, page, ctx->scratch)) < TM_PAGE) {
        what->form = BLOCK_LZ4;
        what->payload = ctx->scratch;
    }
}

int slot_put(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, const uint8_t *page, enum keep keep,
             const uint64_t *expected)
{
    struct content what = {0};
    /* Semantics D6: who refuses all puts must not keep what they would have replaced. */
    if (refuses_puts(ctx) && keep == KEEP_OR_WAIT && phase_of(ctx->seg, ctx->client) >= PHASE_FROZEN)
        return TM_WAIT;
    if (refuses_puts(ctx))
        return refuse(ctx, pool, slot, keep);
    what.fill = codec_fill(page, &what.value);
    if (!what.fill) {
        prefetch_old(ctx->seg, slot);
        uint64_t began = ctx->began_ns ? timing_now() : 0;
        encode(ctx, pool, page, &what);
        if (began && what.form != BLOCK_LOOSE)
            timing_add(ctx->seg, T_COMPRESS, timing_now() - began);
    }
    return slot_store(ctx, pool, slot, &what, keep, expected);
}

/* A hit of a page that stays: it is worth more now, unless it has only just come (evict.c). Saturated pages are not
 * written to. */
static void touch(struct tm_segment *seg, slot_t *slot, uint64_t word)
{
    if (slot_type(word) == SLOT_TWIN)
        return; /* the hit was its original's */
    if (!slot_freq(word) && slot_type(word) == SLOT_BLOCK && block_is_young(seg, word & SLOT_VALUE))
        return;
    if (slot_freq(word) < 3)
        atomic_compare_exchange_strong_explicit(slot, &word, word + SLOT_FREQ_ONE, memory_order_relaxed,
                                                memory_order_relaxed);
}

static bool is_condensed(struct tm_segment *seg, uint64_t block)
{
    return block_kind(atomic_load_explicit(&block_at(seg, block)->word, memory_order_relaxed)) == BLOCK_ZSTD;
}

/* A page was used: in memory it is not cold, in a tier it and its neighbours are wanted back. Only the first use after
 * each look costs a write. */
static void note_use(struct tm_segment *seg, uint32_t pool, slot_t *slot, uint64_t word)
{
    unsigned type = slot_type(word);
    if (!(word & SLOT_FREQ) && (type == SLOT_BLOCK || type == SLOT_TIER || type == SLOT_PACKED)
        && notes_use(seg, pool / TM_CLIENT_POOLS))
        atomic_compare_exchange_strong_explicit(slot, &word, word | SLOT_FREQ_ONE, memory_order_relaxed,
                                                memory_order_relaxed);
}

/* Have what is read of a block arrive while its header is looked at: the beginning of each of the two pages it lies on, where no CPU
 * fetches ahead by itself. One page at random, uncompressed, took 1.73 us and takes 1.47 (three runs in turn, 30,000 pages);
 * a compressed one as before. In a run the one before it asks for the next. */
static void prefetch_block(const struct tm_segment *seg, uint64_t block)
{
    enum { LINE = 64, FIRST = 16, SECOND = 4 };
    const uint8_t *from = (const uint8_t *)block_at(seg, block), *page = from + TM_PAGE - (uintptr_t)from % TM_PAGE;
    for (unsigned i = 0; i < FIRST; i++)
        __builtin_prefetch(from + (size_t)i * LINE);
    for (unsigned i = 0; i < SECOND; i++)
        __builtin_prefetch(page + (size_t)i * LINE);
}

int slot_get(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint8_t *page, uint64_t *seen)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_pool *p = &seg->pools[pool];
    for (;;) {
        uint64_t word = atomic_load_explicit(slot, memory_order_acquire);
        bool good = true;
        if (seen)
            *seen = word;
        if (!slot_stored(word))
            return TM_MISS;
        if (slot_type(word) == SLOT_FILL) {
            codec_expand(word & SLOT_VALUE, page);
        } else if (slot_type(word) == SLOT_TIER) {
            int rc = tier_get(ctx, slot, word, page);
            /* Also after the window was opened: what a slot names from then on is not used again. */
            uint64_t now = atomic_load(slot);
            if ((now ^ word) & ~SLOT_FREQ) {
                ctx->window.nwanted = 0;
                continue;
            }
            if (rc == TM_AWAY)
                return TM_AWAY;
            good = rc == TM_OK;
            count(seg, pool, C_FETCHED, good);
            word = now;
        } else if (slot_type(word) == SLOT_TWIN || slot_type(word) == SLOT_PACKED) {
            bool packed = slot_type(word) == SLOT_PACKED;
            uint64_t began = packed && ctx->began_ns ? timing_now() : 0;
            int rc = packed ? pack_get(ctx, pool, slot, word, page) : twin_get(ctx, pool, word, page);
            if (began)
                timing_add(seg, T_EXPAND, timing_now() - began);
            atomic_thread_fence(memory_order_acquire);
            uint64_t now = atomic_load(slot);
            if (((now ^ word) & ~SLOT_FREQ) && !MUTANT(18)) {
                ctx->window.nwanted = 0;
                continue; /* else the original, or pack, was ours to read all the time: it stays while a slot names it */
            }
            if (rc == TM_AWAY)
                return TM_AWAY;
            if (rc == TM_MISS && !p->persistent) { /* its original was evicted */
                if (twin_is_gone(ctx, pool, slot, now))
                    return TM_MISS;
                continue;
            }
            good = rc == TM_OK;
            word = now;
        } else {
            uint64_t block = word & SLOT_VALUE, began = ctx->began_ns ? timing_now() : 0;
            if (!ctx->next_payload && in_data(seg, block * 16))
                prefetch_block(seg, block);
            good = in_data(seg, block * 16)
                   && block_read(ctx, block_at(seg, block), slot_number(seg, slot), seg->size - block * 16, page);
            if (began)
                timing_add(seg, good && is_condensed(seg, block) ? T_EXPAND : T_DECOMPRESS, timing_now() - began);
            atomic_thread_fence(memory_order_acquire);
            uint64_t now = atomic_load_explicit(slot, memory_order_relaxed);
            if (((now ^ word) & ~SLOT_FREQ) && !MUTANT(6))
                continue; /* replaced while we read; if not, the block was ours to read all the time */
            word = now;
        }
        if (good && !p->exclusive) {
            if (slot_type(word) == SLOT_BLOCK)
                note_touched(seg, word & SLOT_VALUE);
            if (!p->persistent)
                touch(seg, slot, word);
            else
                note_use(seg, pool, slot, word);
            return TM_OK;
        }
        if (!good)
            count(seg, pool, C_CORRUPT, p->persistent ? 1 : 0);
        if (!good && p->persistent)
            return TM_CORRUPT;
        /* Exclusive: ours alone only if we take it out. A corrupt ephemeral page goes the same way, as a miss. */
        if (slot_replace(ctx, pool, slot, &word, empty_word(seg, pool, word))) {
            count(seg, pool, good ? C_TAKEN : C_CORRUPT, 1);
            return good ? TM_OK : TM_MISS;
        }
    }
}
