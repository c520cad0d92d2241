/* Units of memory within chunks: blocks (compressed pages) and meta units (objects, nodes, leaves).
 *
 * Truth is the bitmap of the chunk; the free count and the bin's list of chunks with room are derived. A block
 * carries the stamp of its allocation, so that a repairer can tell the block that an intent names from a later
 * one at the same place. Meta units have no header; there the order of stores under the bin's lock decides, and
 * whoever takes the lock over from the dead resolves the one ambiguous instant (repair_bin). */
#include "tm.h"

/* Sizes of blocks. The large ones divide a chunk without a rest; below 2 KiB they are about 40 bytes apart. Of 144,000
 * anonymous pages, as LZ4, 3.6 % of the memory is lost to headers, rounding and rests; with steps of 64 bytes 4.9 %. */
const uint16_t tm_strides[TM_NCLASSES] = {
    128,  160,  208,  240,  288,  320,  368,  400,  448,  480,  528,  560,  608,  640,  688,  720,
    768,  800,  848,  880,  928,  960,  1008, 1040, 1088, 1120, 1168, 1200, 1248, 1280, 1328, 1360,
    1392, 1456, 1488, 1520, 1552, 1584, 1632, 1680, 1712, 1760, 1808, 1872, 1920, 1984, 2048, 2112,
    2176, 2256, 2336, 2416, 2512, 2608, 2720, 2848, 2976, 3120, 3264, 3440, 3632, 3840, 4096, TM_STRIDE_RAW,
};
uint8_t tm_classes[TM_STRIDE_RAW / 16 + 1];

/* When the library is loaded, so that no call has to ask. */
__attribute__((constructor)) static void fill_classes(void)
{
    for (uint32_t size = 0, cls = 0; size <= TM_STRIDE_RAW; size += 16) {
        cls += size > tm_strides[cls];
        tm_classes[size / 16] = (uint8_t)cls;
    }
}

void bin_ready(struct tm_segment *seg, uint32_t bin)
{
    /* A lock is initialised once in the life of a segment and never again (under the control lock). */
    if (!atomic_load(&seg->bins[bin].ready)) {
        lock_init(&seg->bins[bin].lock);
        atomic_store(&seg->bins[bin].ready, 1);
    }
}

uint32_t bin_stride(uint32_t bin)
{
    static const uint32_t leaf[3] = {128, 512, TM_PAGE};
    if (bin >= BIN_LEAF)
        return leaf[(bin - BIN_LEAF) % 3];
    if (bin == BIN_OBJECT)
        return (uint32_t)sizeof(struct tm_object);
    if (bin == BIN_NODE)
        return TM_PAGE;
    uint32_t cls = bin < BIN_OBJECT ? bin : (bin - BIN_EPHEMERAL) % TM_NCLASSES;
    return tm_strides[cls];
}

struct tm_bin *bin_lock(struct tm_segment *seg, uint32_t bin)
{
    struct tm_bin *b = &seg->bins[bin];
    if (lock_take(&b->lock))
        repair_bin(seg, bin);
    return b;
}

static void list_locked(struct tm_segment *seg, struct tm_bin *b, uint32_t c)
{
    struct tm_chunk *d = &seg->chunks[c];
    d->next = b->partial;
    d->prev = 0;
    if (b->partial)
        seg->chunks[b->partial - 1].prev = c + 1;
    b->partial = c + 1;
    d->flags |= CF_LISTED;
    atomic_fetch_add_explicit(&b->room, d->nfree, memory_order_relaxed);
}

static void unlist_locked(struct tm_segment *seg, struct tm_bin *b, uint32_t c)
{
    struct tm_chunk *d = &seg->chunks[c];
    if (d->prev)
        seg->chunks[d->prev - 1].next = d->next;
    else
        b->partial = d->next;
    if (d->next)
        seg->chunks[d->next - 1].prev = d->prev;
    d->flags &= (uint16_t)~CF_LISTED;
    atomic_fetch_sub_explicit(&b->room, d->nfree, memory_order_relaxed);
}

/* Make chunk `c` ours: nobody else lists it or allocates in it. The intent must stand already. */
static void own_locked(struct tm_ctx *ctx, struct tm_bin *b, uint32_t c)
{
    struct tm_chunk *d = &ctx->seg->chunks[c];
    if (d->flags & CF_LISTED)
        unlist_locked(ctx->seg, b, c);
    d->prev = ctx->index;
    atomic_signal_fence(memory_order_seq_cst); /* nobody dies between the two the other way round: gcc does put them so */
    d->flags |= CF_OWNED;
}

bool chunk_is_owned(struct tm_segment *seg, uint32_t c, uint32_t bin, bool *owned, uint32_t *owner)
{
    const struct tm_chunk *d = &seg->chunks[c];
    if (!MUTANT(30))
        chunks_lock(seg);
    bool of_bin = atomic_load(&seg->states[c]) == CHUNK_USED && d->bin == bin;
    KP(58);
    *owned = d->flags & CF_OWNED;
    KP(48);
    *owner = d->prev;
    if (!MUTANT(30))
        chunks_unlock(seg);
    return of_bin;
}

bool chunk_own(struct tm_ctx *ctx, uint32_t c, uint32_t bin)
{
    bool owned;
    uint32_t owner;
    struct tm_bin *b = bin_lock(ctx->seg, bin);
    bool mine = chunk_is_owned(ctx->seg, c, bin, &owned, &owner) && !owned;
    if (mine)
        own_locked(ctx, b, c);
    lock_drop(&b->lock);
    return mine;
}

bool chunk_settle(struct tm_ctx *ctx, uint32_t c)
{
    struct tm_chunk *d = &ctx->seg->chunks[c];
    struct tm_bin *b = bin_lock(ctx->seg, d->bin);
    bool empty = d->nfree == TM_CHUNK / bin_stride(d->bin);
    if (!empty) {
        d->flags &= (uint16_t)~CF_OWNED;
        if (d->nfree)
            list_locked(ctx->seg, b, c);
    }
    lock_drop(&b->lock);
    if (empty)
        chunk_release(ctx, c);
    return empty;
}

/* Find and mark a free unit of `bin`; its offset, or 0 if no memory can be had. `before` notes the intent. */
static uint64_t unit_alloc(struct tm_ctx *ctx, uint32_t bin, enum alloc how,
                           void (*before)(struct tm_ctx *ctx, uint64_t offset))
{
    struct tm_segment *seg = ctx->seg;
    uint32_t stride = bin_stride(bin), units = TM_CHUNK / stride;
    for (;;) {
        struct tm_bin *b = bin_lock(seg, bin);
        uint32_t c = b->partial;
        if (c) {
            struct tm_chunk *d = &seg->chunks[--c];
            uint32_t bit = 0;
            for (uint32_t w = 0;; w++)
                if (~d->bitmap[w]) {
                    bit = w * 64 + (uint32_t)__builtin_ctzll(~d->bitmap[w]);
                    break;
                }
            if (bit >= units) /* only a damaged segment: a listed chunk has room */
                __builtin_trap();
            uint64_t offset = seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride;
            before(ctx, offset);
            KP(1);
            atomic_signal_fence(memory_order_seq_cst); /* nobody dies between the two the other way round */
            d->bitmap[bit / 64] |= UINT64_C(1) << (bit % 64);
            KP(2);
            atomic_fetch_sub_explicit(&b->room, 1, memory_order_relaxed);
            if (--d->nfree == 0)
                unlist_locked(seg, b, c);
            KP(3);
            lock_drop(&b->lock);
            return offset;
        }
        lock_drop(&b->lock);
        c = how == ALLOC_LISTED ? 0 : chunk_take(ctx, bin, how);
        if (!c)
            return 0;
        KP(4);
        b = bin_lock(seg, bin);
        seg->chunks[c - 1].flags &= (uint16_t)~CF_OWNED;
        list_locked(seg, b, c - 1);
        atomic_store(&ctx->rec->chunk, 0);
        lock_drop(&b->lock);
    }
}

/* Unmark the unit at `offset` of the locked bin, which is dropped, and clear its intent; an emptied chunk is released. */
static void unit_free_locked(struct tm_ctx *ctx, struct tm_bin *b, uint64_t offset, void (*after)(struct tm_ctx *ctx))
{
    struct tm_segment *seg = ctx->seg;
    uint32_t c = chunk_of(seg, offset);
    struct tm_chunk *d = &seg->chunks[c];
    uint32_t stride = bin_stride(d->bin);
    uint32_t bit = (uint32_t)((offset - seg->data_offset) % TM_CHUNK) / stride;
    KP(5);
    d->bitmap[bit / 64] &= ~(UINT64_C(1) << (bit % 64));
    KP(6);
    after(ctx);
    if (d->flags & CF_LISTED)
        atomic_fetch_add_explicit(&b->room, 1, memory_order_relaxed);
    d->nfree++;
    bool empty = d->nfree == TM_CHUNK / stride && !(d->flags & CF_OWNED);
    if (empty) {
        atomic_store(&ctx->rec->chunk, c + 1);
        KP(7);
        own_locked(ctx, b, c);
    } else if (!(d->flags & (CF_OWNED | CF_LISTED))) {
        list_locked(seg, b, c);
    }
    lock_drop(&b->lock);
    if (empty)
        chunk_release(ctx, c);
}

static void unit_free(struct tm_ctx *ctx, uint64_t offset, void (*after)(struct tm_ctx *ctx))
{
    struct tm_segment *seg = ctx->seg;
    unit_free_locked(ctx, bin_lock(seg, seg->chunks[chunk_of(seg, offset)].bin), offset, after);
}

static void intend_block(struct tm_ctx *ctx, uint64_t offset)
{
    struct tm_block *block = at(ctx->seg, offset);
    uint32_t stamp = ctx->index << 22 | (++ctx->rec->seq & 0x3fffff);
    atomic_store_explicit(&ctx->rec->new_stamp, stamp, memory_order_relaxed);
    atomic_store_explicit(&ctx->rec->new_block, offset / 16, memory_order_release);
    atomic_store_explicit(&block->stamp, stamp, memory_order_release);
}

uint64_t block_alloc(struct tm_ctx *ctx, uint32_t bin, enum alloc how)
{
    uint64_t offset = unit_alloc(ctx, bin, how, intend_block);
    /* Rather a block that is too large than none; raw pages are told by the size of their blocks. */
    uint32_t cls = bin < BIN_OBJECT ? bin - BIN_PERSISTENT : (bin - BIN_EPHEMERAL) % TM_NCLASSES;
    for (uint32_t more = 1; !offset && how == ALLOC_NORMAL && cls + more < TM_NCLASSES - 1; more++)
        if (atomic_load_explicit(&ctx->seg->bins[bin + more].room, memory_order_relaxed))
            offset = unit_alloc(ctx, bin + more, ALLOC_LISTED, intend_block);
    return offset / 16;
}

static void old_done(struct tm_ctx *ctx) { atomic_store_explicit(&ctx->rec->old_block, 0, memory_order_release); }
static void new_done(struct tm_ctx *ctx) { atomic_store_explicit(&ctx->rec->new_block, 0, memory_order_release); }

void block_free_old(struct tm_ctx *ctx) { unit_free(ctx, atomic_load(&ctx->rec->old_block) * 16, old_done); }
void block_free_new(struct tm_ctx *ctx) { unit_free(ctx, atomic_load(&ctx->rec->new_block) * 16, new_done); }

void block_free_locked(struct tm_ctx *ctx, struct tm_bin *b, bool old)
{
    uint64_t block = atomic_load(old ? &ctx->rec->old_block : &ctx->rec->new_block);
    unit_free_locked(ctx, b, block * 16, old ? old_done : new_done);
}

static void intend_meta(struct tm_ctx *ctx, uint64_t offset)
{
    atomic_store(&ctx->rec->meta_parent, 0);
    atomic_store(&ctx->rec->meta_new, (uint32_t)(offset / 128));
}

uint32_t meta_alloc(struct tm_ctx *ctx, uint32_t bin)
{
    uint32_t ref = (uint32_t)(unit_alloc(ctx, bin, ALLOC_NORMAL, intend_meta) / 128);
    if (!ref)
        atomic_fetch_add_explicit(&ctx->seg->super->no_memory, 1, memory_order_relaxed);
    return ref;
}

static void meta_old_done(struct tm_ctx *ctx) { atomic_store(&ctx->rec->meta_old, 0); }
static void meta_new_done(struct tm_ctx *ctx) { atomic_store(&ctx->rec->meta_new, 0); }

void meta_free(struct tm_ctx *ctx, uint32_t ref)
{
    atomic_store(&ctx->rec->meta_old, ref);
    unit_free(ctx, (uint64_t)ref * 128, meta_old_done);
}

void meta_free_new(struct tm_ctx *ctx)
{
    unit_free(ctx, (uint64_t)atomic_load(&ctx->rec->meta_new) * 128, meta_new_done);
}

/* The chunk and bit of a unit of `size` bytes at `offset`, if its chunk is in use by a bin of that sort. */
static uint64_t place(struct tm_segment *seg, uint64_t offset, bool block, uint32_t *c, uint32_t *bit)
{
    if (!in_data(seg, offset))
        return 0;
    *c = chunk_of(seg, offset);
    if (atomic_load(&seg->states[*c]) != CHUNK_USED || bin_is_block(seg->chunks[*c].bin) != block)
        return 0;
    uint32_t stride = bin_stride(seg->chunks[*c].bin);
    uint32_t within = (uint32_t)((offset - seg->data_offset) % TM_CHUNK);
    *bit = within / stride;
    return within % stride == 0 && *bit < TM_CHUNK / stride ? offset : 0;
}

uint64_t block_place(struct tm_segment *seg, uint64_t block, uint32_t *c, uint32_t *bit)
{
    return place(seg, block * 16, true, c, bit);
}

uint64_t meta_place(struct tm_segment *seg, uint32_t ref, uint32_t *c, uint32_t *bit)
{
    return place(seg, (uint64_t)ref * 128, false, c, bit);
}
