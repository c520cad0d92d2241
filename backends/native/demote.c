/* Demotion: pages that leave memory for a tier, in three steps that only the last of which changes anything.
 *
 *   collect  copy cold persistent pages as records, and note slot, word and stamp of each
 *   (write   the caller stores the records in the tier, which acknowledges them with a location each)
 *   demote   swap each slot from the word that was seen to TIER | location, and free the block
 *
 * So there is no page in transit: until the swap it is in memory, from then on it is in the tier, and a page that
 * changed meanwhile stays where it is and leaves a record that no slot names. Who dies on the way leaves the same.
 *
 * What is cold a clock tells: a page that was put or got is marked in its slot (`notes_use`); `collect` goes around
 * and takes the mark away, and takes the page the next time if it has not been used since. Not while the client
 * is handed over, when these bits say what was exported.
 *
 * Which locations live only the slots know. Who wants to use the others again asks `tm_live`, then waits in
 * `tier_grace` for everybody who may still read what a slot named before. */
#include "tm.h"

#include <sched.h>
#include <string.h>
#include <time.h>

/* Copy the page of `word` as a record to `to`; its length, or 0 if it is not sound or has changed meanwhile. */
static uint32_t copy_record(struct tm_segment *seg, slot_t *slot, uint64_t word, uint8_t *to, uint32_t *stamp)
{
    uint64_t block = word & SLOT_VALUE, number = slot_number(seg, slot);
    if (!in_data(seg, block * 16))
        return 0;
    const struct tm_block *from = block_at(seg, block);
    struct tm_block *b = (struct tm_block *)to;
    uint64_t header = atomic_load_explicit(&from->word, memory_order_acquire);
    uint32_t length = block_length(header);
    *stamp = atomic_load(&from->stamp);
    if (header_slot(header) != number || !length || length > TM_PAGE || block * 16 + TM_HEADER + length > seg->size)
        return 0;
    memcpy(to, from, TM_HEADER + length);
    atomic_thread_fence(memory_order_acquire);
    if ((atomic_load(slot) ^ word) & ~SLOT_FREQ || b->checksum != block_checksum(b, header, *stamp))
        return 0;
    uint32_t ours = tier_stamp(seg, slot_next(word, SLOT_TIER, 0));
    atomic_store_explicit(&b->stamp, ours, memory_order_relaxed);
    b->checksum = block_checksum(b, header, ours);
    return TM_HEADER + length;
}

/* The same of a page in a pack: it leaves as a condensed page by itself. */
static uint32_t pack_record(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint8_t *to, uint32_t *stamp)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_block *b = (struct tm_block *)to;
    const uint8_t *payload = ctx->packed;
    *stamp = pack_stamp(seg, pool, slot, word);
    if (!*stamp || pack_get(ctx, pool, slot, word, ctx->moved) != TM_OK)
        return 0;
    atomic_thread_fence(memory_order_acquire);
    if (slot_changed(slot, word) || pack_stamp(seg, pool, slot, word) != *stamp)
        return 0;
    uint32_t length = codec_condense(seg, LEVEL_AT_ONCE, ctx->moved, ctx->packed), form = BLOCK_ZSTD;
    if (length == TM_PAGE) {
        payload = ctx->moved;
        form = BLOCK_RAW;
    }
    atomic_store_explicit(&b->stamp, tier_stamp(seg, slot_next(word, SLOT_TIER, 0)), memory_order_relaxed);
    block_write(b, slot_number(seg, slot), form, length, payload);
    return TM_HEADER + length;
}

struct collection {
    uint8_t *buffer;
    size_t size, used;
    struct tm_candidate *out;
    uint32_t n, most;
    uint32_t epoch;
};

static bool is_full(const struct collection *c)
{
    return c->n == c->most || c->size - c->used < TM_HEADER + TM_PAGE;
}

/* Take the page of this slot if it is cold; or make it colder. */
static void consider(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, bool any, struct collection *c)
{
    uint64_t word = atomic_load_explicit(slot, memory_order_acquire);
    bool packed = slot_type(word) == SLOT_PACKED;
    if ((slot_type(word) != SLOT_BLOCK && !packed) || phase_of(ctx->seg, pool / TM_CLIENT_POOLS))
        return;
    /* We found this leaf by its chunk, so it may be freed and its memory used again under our eyes. Bytes of a page may
     * look like a slot, but no block names them as its own. */
    if (packed ? leaf_pool(ctx->seg, slot_number(ctx->seg, slot)) != (int)pool || !pack_stamp(ctx->seg, pool, slot, word)
               : !in_data(ctx->seg, (word & SLOT_VALUE) * 16)
                     || header_slot(atomic_load(&block_at(ctx->seg, word & SLOT_VALUE)->word)) != slot_number(ctx->seg, slot))
        return;
    if (word & SLOT_FREQ && !any) {
        atomic_compare_exchange_strong(slot, &word, word & ~SLOT_FREQ);
        return;
    }
    struct tm_candidate *page = &c->out[c->n];
    page->length = packed ? pack_record(ctx, pool, slot, word, c->buffer + c->used, &page->stamp)
                          : copy_record(ctx->seg, slot, word, c->buffer + c->used, &page->stamp);
    if (!page->length)
        return;
    page->slot = slot_number(ctx->seg, slot);
    page->word = word;
    page->pool = pool;
    page->at = (uint32_t)c->used;
    page->epoch = c->epoch;
    c->n++;
    c->used += (page->length + 15) / 16 * 16;
}

/* The bin of chunk `c` if it holds leaves of the client, else 0. Read once: the chunk may become another's meanwhile. */
static uint32_t leaf_bin(struct tm_segment *seg, uint32_t c, uint32_t id)
{
    uint32_t first = BIN_LEAF + id * TM_CLIENT_POOLS * 3, bin = seg->chunks[c].bin;
    bool is = atomic_load(&seg->states[c]) == CHUNK_USED && bin >= first && bin < first + TM_CLIENT_POOLS * 3;
    return is ? bin : 0;
}

bool leaf_at(struct tm_segment *seg, uint32_t id, uint64_t *at_slot, struct leaf *leaf)
{
    uint32_t c = chunk_of(seg, *at_slot * 8);
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = leaf_bin(seg, c, id);
    uint64_t chunk_start = (seg->data_offset + (uint64_t)c * TM_CHUNK) / 8;
    if (!bin) {
        *at_slot = chunk_start + TM_CHUNK / 8;
        return false;
    }
    uint32_t stride = bin_stride(bin), bit = (uint32_t)((*at_slot - chunk_start) * 8) / stride;
    leaf->pool = (bin - BIN_LEAF) / 3u;
    leaf->end = chunk_start + (uint64_t)(bit + 1) * stride / 8;
    if (bit_is_set(d, bit) && seg->pools[leaf->pool].persistent && !is_packs(leaf->pool)
        && atomic_load(&seg->pools[leaf->pool].state) == LIVE)
        return true;
    *at_slot = leaf->end;
    return false;
}

/* Has the client the tier of this epoch? Inside an operation: who takes the tier away waits for us, or we see it. */
static bool has_tier(struct tm_segment *seg, uint32_t id, uint32_t epoch)
{
    return atomic_load(&seg->clients[id].tiered) && atomic_load(&seg->clients[id].tier_epoch) == epoch;
}

/* From slot `*hand` (0: the first) on; `*hand` is 0 after the last, else where to go on. Nothing for another tier than
 * the client has now. */
int64_t tm_collect(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t epoch, bool any, uint64_t *hand,
                   uint8_t *buffer, size_t size, struct tm_candidate *out, uint32_t most)
{
    struct tm_segment *seg = ctx->seg;
    struct collection collected = {buffer, size, 0, out, 0, most, epoch};
    uint64_t at_slot = *hand * 8 < seg->data_offset ? seg->data_offset / 8 : *hand;
    while (at_slot * 8 < seg->size && !is_full(&collected)) {
        struct leaf leaf;
        op_begin(ctx); /* one for each leaf */
        if (!client_lives(seg, id, serial)) {
            op_end(ctx);
            return TM_NOPOOL;
        }
        if (!has_tier(seg, id, epoch)) {
            op_end(ctx);
            break;
        }
        if (leaf_at(seg, id, &at_slot, &leaf))
            for (; at_slot < leaf.end && !is_full(&collected); at_slot++)
                consider(ctx, leaf.pool, at(seg, at_slot * 8), any, &collected);
        op_end(ctx);
    }
    *hand = at_slot * 8 < seg->size ? at_slot : 0;
    return collected.n;
}

static bool demote_one(struct tm_ctx *ctx, const struct tm_candidate *page, uint64_t location)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t client = page->pool / TM_CLIENT_POOLS;
    if (!location || location > SLOT_VALUE || slot_pool(seg, page->slot) != (int)page->pool || phase_of(seg, client)
        || (!has_tier(seg, client, page->epoch) && !MUTANT(14)))
        return false;
    slot_t *slot = at(seg, page->slot * 8);
    uint64_t word = atomic_load_explicit(slot, memory_order_acquire);
    /* Not if it was used while its record was written. The stamp tells this block from a later one at the same place,
     * for a leaf that was used again has generations that begin anew. Inside the operation a slot that still is
     * as it was belongs to a leaf that stays. */
    if (word != (page->word & ~SLOT_FREQ) && word != page->word && !MUTANT(13))
        return false;
    if (slot_type(word) != SLOT_BLOCK && slot_type(word) != SLOT_PACKED)
        return false;
    uint32_t stamp = slot_type(word) == SLOT_PACKED ? pack_stamp(seg, page->pool, slot, word)
                                                    : atomic_load(&block_at(seg, word & SLOT_VALUE)->stamp);
    if (stamp != page->stamp && !MUTANT(13) && !MUTANT(56))
        return false;
    KP(103);
    if (!slot_replace(ctx, page->pool, slot, &word, slot_next(word, SLOT_TIER, location)))
        return false;
    KP(104);
    count(seg, page->pool, C_DEMOTED, 1);
    return true;
}

/* The pages whose records have been acknowledged at these locations leave memory; the number that did. */
int64_t tm_demote(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const struct tm_candidate *pages,
                  const uint64_t *locations, uint32_t n)
{
    struct tm_segment *seg = ctx->seg;
    int64_t done = 0;
    for (uint32_t i = 0; i < n; i++) {
        op_begin(ctx);
        bool lives = client_lives(seg, id, serial) && pages[i].pool / TM_CLIENT_POOLS == id
                     && atomic_load(&seg->pools[pages[i].pool].state) == LIVE;
        ctx->client = ctx->payer = id;
        done += lives && demote_one(ctx, &pages[i], locations[i]);
        op_end(ctx);
        if (!lives)
            return TM_NOPOOL;
    }
    return done;
}

uint64_t tm_live(struct tm_ctx *ctx, uint32_t id, uint64_t *out, uint64_t most)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t n = 0;
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        op_begin(ctx);
        uint32_t bin = leaf_bin(seg, c, id), stride = bin ? bin_stride(bin) : TM_CHUNK;
        for (uint32_t bit = 0; stride < TM_CHUNK && bit < TM_CHUNK / stride; bit++) {
            if (!bit_is_set(&seg->chunks[c], bit))
                continue;
            slot_t *slots = at(seg, seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride);
            for (uint32_t i = 0; i < stride / 8; i++) {
                uint64_t word = atomic_load_explicit(&slots[i], memory_order_acquire);
                if (slot_type(word) != SLOT_TIER)
                    continue;
                if (n < most)
                    out[n] = word & SLOT_VALUE;
                n++;
            }
        }
        op_end(ctx);
    }
    return n;
}
