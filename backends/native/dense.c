/* More pages per byte, in the background: what nobody asked for in a while is stored smaller.
 *
 * A visit goes over chunks. A page that was neither put nor got between the last two visits of its chunk is cold, and is
 * compressed again with zstd; a condensed page that was got in both intervals is stored as LZ4 again, because it costs
 * four times as much to read, unless memory is short (`may_expand`), for that takes more of it. Loose pages (codec.c) are
 * compressed at any age when memory is not in plenty any more.
 *
 * What is done to a page is what a put of the same bytes would do: write a block, swap the slot if it is as it was when
 * the page was read, free the old block. So readers, writers, evictions and deaths meet nothing new. Nothing is
 * evicted for it, and no chunk is owned: a chunk that becomes another's meanwhile has no slot that refers into it where
 * we look. Runs in one thread of the manager; two at once only do the same work twice. */
#include "tm.h"

#include <stdlib.h>
#include <string.h>

/* Below this a condensed block could save a step or two at most, and never pays for itself. */
enum { SMALLEST = 256 };

/* The bin in which the page of `old_bin` is kept once it has another length. */
static uint32_t bin_for(struct tm_segment *seg, uint32_t old_bin, uint32_t length)
{
    return bin_is_ephemeral(old_bin) ? ephemeral_bin(seg, bin_account(old_bin), bin_queue(old_bin), length)
                                     : BIN_PERSISTENT + size_class(length);
}

/* A block for it: holes first, then a chunk that nobody needs, then a larger hole; a smaller one than now if `smaller`. */
static uint64_t place_for(struct tm_ctx *ctx, uint32_t bin, uint32_t old_bin, bool smaller)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t last = bin_is_ephemeral(bin) ? bin_ephemeral(bin_account(bin), bin_queue(bin), TM_NCLASSES - 1)
                                          : BIN_PERSISTENT + TM_NCLASSES - 1;
    uint64_t block = block_spare(ctx, bin);
    for (uint32_t more = bin + 1; !block && more < last && !(smaller && more >= old_bin); more++)
        if (atomic_load_explicit(&seg->bins[more].room, memory_order_relaxed))
            block = block_alloc(ctx, more, ALLOC_LISTED);
    return block;
}

enum outcome { DONE, IN_VAIN, NO_ROOM };

/* Count the block of a condensed page. */
static void count_condensed(struct tm_segment *seg, uint64_t block, uint32_t form, struct tm_condensed *found)
{
    uint32_t before = form_before(form);
    found->pages++;
    if (before && before <= TM_NCLASSES)
        found->saved += (int64_t)tm_strides[before - 1] - stride_at(seg, block);
}

/* Store the page of `slot`, which is as `word` says, in another form. */
static enum outcome recode(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, enum block_kind kind,
                           struct tm_condensed *found)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t old = word & SLOT_VALUE, number = slot_number(seg, slot);
    enum block_kind before = block_kind(atomic_load(&block_at(seg, old)->word));
    uint32_t old_bin = seg->chunks[chunk_of(seg, old * 16)].bin;
    if (!block_read(ctx, block_at(seg, old), number, seg->size - old * 16, ctx->moved) || !bin_is_block(old_bin))
        return IN_VAIN; /* corrupt, or gone this moment */
    uint32_t length = kind == BLOCK_ZSTD ? codec_condense(seg, condense_level(seg), ctx->moved, ctx->packed)
                                         : codec_compress(ctx, ctx->moved, ctx->packed);
    uint32_t bin = bin_for(seg, old_bin, length);
    bool smaller = before != BLOCK_ZSTD;
    if (length == TM_PAGE || (smaller && bin >= old_bin))
        return IN_VAIN;
    uint64_t block = place_for(ctx, bin, old_bin, smaller);
    if (!block)
        return NO_ROOM;
    uint32_t form = kind == BLOCK_ZSTD ? condensed_form(bin_class(old_bin)) : kind;
    block_write(block_at(seg, block), number, form, length, ctx->packed);
    KP(54);
    int64_t saved = (int64_t)bin_stride(old_bin) - bin_stride(seg->chunks[chunk_of(seg, block * 16)].bin);
    if (!slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_BLOCK, block) | (word & SLOT_FREQ))) {
        block_free_new(ctx);
        return DONE; /* it changed, so it is not cold */
    }
    KP(55);
    if (before == BLOCK_ZSTD) {
        note_touched(seg, block);
        atomic_fetch_add_explicit(&seg->super->restored, 1, memory_order_relaxed);
        if (saved < 0) /* else it had been moved into a larger hole */
            atomic_fetch_add_explicit(&seg->super->restored_bytes, (uint64_t)-saved, memory_order_relaxed);
    } else {
        bool squeezed = kind == BLOCK_LZ4;
        atomic_fetch_add_explicit(squeezed ? &seg->super->squeezed : &seg->super->condensed, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(squeezed ? &seg->super->squeezed_bytes : &seg->super->condensed_bytes,
                                  (uint64_t)saved, memory_order_relaxed);
        if (kind == BLOCK_ZSTD && block < old) /* else the round comes by yet */
            count_condensed(seg, block, form, found);
    }
    return DONE;
}

/* What should become of a page of `pool` that is stored as `kind`; the same if nothing. */
static enum block_kind wanted(struct tm_segment *seg, uint32_t pool, enum block_kind kind, bool cold, bool hot,
                              unsigned what)
{
    uint32_t client = payer_of(seg, pool) % TM_MAX_CLIENTS;
    bool condense = cold && (what & (seg->pools[pool].persistent ? CONDENSE_PERSISTENT : CONDENSE_EPHEMERAL));
    if (atomic_load_explicit(&seg->clients[client].codec, memory_order_relaxed) == CODEC_NONE)
        return kind; /* whoever wants its pages as they are has them so */
    switch (kind) {
    case BLOCK_ZSTD:
        return hot ? BLOCK_LZ4 : kind;
    case BLOCK_LOOSE:
        return condense ? BLOCK_ZSTD : (what & CONDENSE_LOOSE) ? BLOCK_LZ4 : kind;
    case BLOCK_RAW:
    case BLOCK_LZ4:
        return condense ? BLOCK_ZSTD : kind;
    case BLOCK_PACK:
        return kind;
    }
    return kind;
}

/* May a hot page of that pool take more memory again? Not below an eighth of the memory, or of its client's cap: from there on
 * pages go to tiers, and without one a put would be refused sooner than it must be. `*left`, whether the memory has that,
 * is looked at once for each chunk, -1 before: it asks all clients. */
static bool may_expand(struct tm_segment *seg, uint32_t pool, int *left)
{
    uint32_t client = payer_of(seg, pool) % TM_MAX_CLIENTS;
    uint64_t cap = atomic_load_explicit(&seg->clients[client].cap_bytes, memory_order_relaxed);
    if (*left < 0)
        *left = memory_is_left(seg);
    return MUTANT(42) || (*left && (!cap || has_cap_for(seg, client, (int64_t)(cap / 8) + TM_STRIDE_RAW)));
}

/* The table of what could not be made smaller; made when it is first needed. NULL: no memory. */
static uint64_t *vain_of(struct tm_segment *seg)
{
    uint64_t *have = atomic_load(&seg->vain), *made = have ? NULL : calloc(seg->nchunks, sizeof *made);
    if (!made)
        return have;
    if (atomic_compare_exchange_strong(&seg->vain, &have, made))
        return made;
    free(made); /* another thread was faster */
    return have;
}

/* Visit one chunk from KiB `from` on, inside an operation; from where to go on if it is until_ns of our CPU time before all
 * is done, else 0. At level 19 one page takes milliseconds, and a chunk has hundreds. */
static uint32_t visit(struct tm_ctx *ctx, uint32_t c, uint32_t from, uint64_t until_ns, unsigned what, uint64_t *vain,
                      struct tm_condensed *found)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = d->bin, stride = bin_stride(bin);
    /* From here on it is not punched. What it may become meanwhile is another's, to which no slot of ours refers. */
    if (atomic_load(&seg->states[c]) != CHUNK_USED || !bin_is_block(bin))
        return 0;
    KP(56);
    struct tm_touched *touched = &seg->touched[c];
    uint64_t ours = UINT64_MAX << from;
    uint64_t now = atomic_fetch_and(&touched->now, ~ours) & ours, before = atomic_load(&touched->before);
    atomic_store(&touched->before, (before & ~ours) | now);
    uint64_t cold = what & CONDENSE_ALL ? UINT64_MAX : ~(now | before), hot = now & before, in_vain = 0;
    bool room = true, worked = false;
    uint32_t kib = from;
    int left = -1;
    if (what & CONDENSE_ALL)
        hot = 0;
    *vain &= ~now;
    for (uint32_t bit = 0; bit < TM_CHUNK / stride; bit++) {
        uint32_t last = kib;
        if (bit * stride / 1024 < from)
            continue;
        kib = bit * stride / 1024;
        if (worked && kib != last && timing_cpu() >= until_ns) {
            uint64_t rest = UINT64_MAX << kib; /* as if we had not come by there */
            atomic_fetch_or(&touched->now, now & rest);
            atomic_store(&touched->before, (atomic_load(&touched->before) & ~rest) | (before & rest));
            *vain |= in_vain;
            return kib;
        }
        worked = worked && kib == last;
        uint64_t granule = UINT64_C(1) << kib;
        uint64_t due = what & CONDENSE_LOOSE ? granule : (cold | hot) & granule;
        if (!bit_is_set(d, bit))
            continue;
        uint64_t block = (seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride) / 16;
        uint64_t header = atomic_load(&block_at(seg, block)->word), number = header_slot(header);
        enum block_kind kind = block_kind(header);
        if (kind == BLOCK_PACK) { /* cold, or it is taken apart; not as LZ4, for only one of its pages may be hot */
            int packs = slot_pool(seg, number);
            slot_t *holder = packs < 0 ? NULL : at(seg, number * 8);
            uint64_t held = holder ? atomic_load(holder) : 0;
            worked = true;
            if (holder && is_packs((uint32_t)packs) && slot_refers(held, block))
                pack_tend(ctx, (uint32_t)packs, holder, held, hot & granule && may_expand(seg, (uint32_t)packs, &left), found);
            continue;
        }
        due = room && !(*vain & granule) ? due : 0;
        if (!due && kind != BLOCK_ZSTD)
            continue;
        int pool = slot_pool(seg, number);
        slot_t *slot = pool < 0 ? NULL : at(seg, number * 8);
        uint64_t word = slot ? atomic_load(slot) : 0;
        if (!slot || !slot_refers(word, block))
            continue;
        enum block_kind next = due ? wanted(seg, (uint32_t)pool, kind, cold & granule, hot & granule, what) : kind;
        if (next == BLOCK_ZSTD && stride < SMALLEST)
            next = kind;
        if (next != kind && (kind != BLOCK_ZSTD || may_expand(seg, (uint32_t)pool, &left))) {
            enum outcome came = recode(ctx, (uint32_t)pool, slot, word, next, found);
            worked = true;
            if (came == DONE)
                continue;
            in_vain |= came == IN_VAIN ? granule : 0;
            room = came != NO_ROOM;
        }
        if (kind == BLOCK_ZSTD)
            count_condensed(seg, block, block_form(header), found);
    }
    *vain |= in_vain;
    return 0;
}

uint64_t tm_condense(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, unsigned what, uint64_t *spent_ns,
                     struct tm_condensed *found)
{
    struct tm_condensed nobody = {0};
    struct tm_segment *seg = ctx->seg;
    uint64_t began = timing_cpu(), now = began, until = time_after(began, most_ns);
    uint32_t c = (uint32_t)(first / TM_PLACES), from = first % TM_PLACES % 64;
    uint64_t *vain = vain_of(seg);
    *spent_ns = 0;
    ctx->client = ctx->payer = TM_MAX_CLIENTS; /* on nobody's behalf */
    if (!vain)
        return first;
    for (unsigned idle = 0; c < seg->nchunks && now < until; c += !from) {
        if (atomic_load_explicit(&seg->states[c], memory_order_relaxed) != CHUNK_USED || !bin_is_block(seg->chunks[c].bin)) {
            from = 0;
            if (++idle % 1024 == 0)
                now = timing_cpu();
            continue;
        }
        op_begin(ctx);
        from = visit(ctx, c, from, until, what, &vain[c], found ? found : &nobody);
        op_end(ctx);
        now = timing_cpu();
    }
    *spent_ns = timing_cpu() - began;
    atomic_fetch_add_explicit(&seg->super->condensing_ns, *spent_ns, memory_order_relaxed);
    return c < seg->nchunks ? (uint64_t)c * TM_PLACES + from : 0;
}
