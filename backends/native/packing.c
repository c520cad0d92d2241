/* Packing: the background pass that puts cold neighbours of persistent pools into packs together (pack.c).
 *
 * It looks at the groups of all leaves. The condensed pages of one that nobody used lately are read, made into one frame, all of
 * them or two and two, and if that saves enough the pack's slot and then each page's is swapped, if it is as it was when its
 * page was read. The pass remembers which groups it has seen, in memory of its own. */
#include "tm.h"

#include <stdlib.h>
#include <string.h>

enum {
    GROUP = TM_GROUP,
    MOST = TM_PAGE - TM_LEAST_GAIN,
    GAIN = 16, /* a pack must save a sixteenth of what its pages take, and PACK_LEAST_GAIN bytes */
    ROOM = 8 * TM_STRIDE_RAW /* of its client's cap that is left to puts meanwhile */
};

struct tm_packing {
    uint32_t mask;
    uint32_t *marks; /* by group: which words of it were looked at */
    uint32_t hand[TM_MAX_CLIENTS]; /* index at which the next pack may find room */
};

struct view { /* a page as it was seen */
    slot_t *slot;
    uint64_t word;
    uint32_t stride, form;
};

enum outcome { PACKED, IN_VAIN, NO_ROOM };

/* Put the `n` pages in ctx->unpacked.pages, from `from` on, into one pack, if that saves enough. */
static enum outcome pack(struct tm_ctx *ctx, struct tm_packing *t, uint32_t pool, struct view *views, uint32_t from,
                         uint32_t n)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t packs = packs_of(pool), members = 0, sum = 0, joined = 0;
    uint64_t number = slot_number(seg, views[from].slot), group = number / GROUP * GROUP, word = 0;
    if (!has_cap_for(seg, ctx->payer, ROOM))
        return NO_ROOM;
    /* First: a new leaf may have to evict pages, and what these are compressed to goes where the pack is made. */
    slot_t *slot = MUTANT(66) ? NULL : free_slot(ctx, packs, &t->hand[packs / TM_CLIENT_POOLS], &word);
    if (!slot && !MUTANT(66))
        return NO_ROOM;
    uint8_t *to = ctx->packed + PACK_NUMBER;
    memcpy(ctx->packed, &group, PACK_NUMBER);
    for (uint32_t i = from; i < from + n; i++) {
        members |= 1u << slot_number(seg, views[i].slot) % GROUP;
        sum += views[i].stride;
        *to++ = (uint8_t)size_class(views[i].stride - TM_HEADER);
        *to++ = (uint8_t)form_before(views[i].form);
    }
    uint32_t head = pack_head(members);
    uint32_t length = codec_pack(seg, condense_level(seg), ctx->unpacked.pages + (size_t)from * TM_PAGE, n, to, MOST - head);
    uint32_t bin = BIN_PERSISTENT + size_class(head + length), stride = bin_stride(bin);
    if (!length || stride + (sum / GAIN > PACK_LEAST_GAIN ? sum / GAIN : PACK_LEAST_GAIN) > sum)
        return IN_VAIN;
    if (MUTANT(66))
        slot = free_slot(ctx, packs, &t->hand[packs / TM_CLIENT_POOLS], &word);
    uint64_t block = slot ? block_spare(ctx, bin) : 0;
    if (!block)
        return NO_ROOM;
    bool same = true; /* pages may have been moved to make room for it */
    for (uint32_t i = from; i < from + n; i++)
        same = same && !slot_changed(views[i].slot, views[i].word);
    block_write(block_at(seg, block), slot_number(seg, slot), pack_form(members), head + length, ctx->packed);
    if (!same || (!MUTANT(60) && !twins_lock(seg))) {
        block_free_new(ctx);
        return NO_ROOM;
    }
    KP(127);
    if (!slot_replace(ctx, packs, slot, &word, slot_next(word, SLOT_BLOCK, block))) {
        block_free_new(ctx);
        if (!MUTANT(60))
            twins_unlock(seg);
        return NO_ROOM;
    }
    KP(121);
    int64_t saved = 0;
    for (uint32_t i = from; i < from + n; i++) {
        struct view *v = &views[i];
        if (MUTANT(52))
            v->word = atomic_load(v->slot);
        if (slot_replace(ctx, pool, v->slot, &v->word,
                         slot_next(v->word, SLOT_PACKED, slot_number(seg, slot)) | (v->word & SLOT_FREQ))) {
            joined++;
            saved += v->stride;
        }
        KP(122);
    }
    if (!MUTANT(60))
        twins_unlock(seg);
    atomic_fetch_add_explicit(&seg->super->packed, joined, memory_order_relaxed);
    atomic_fetch_add_explicit(&seg->super->packed_bytes, joined ? saved - stride : 0, memory_order_relaxed);
    pack_lose(seg, (int64_t)n - joined);
    if (!joined)
        pack_remove(ctx, packs, slot, NULL);
    return PACKED;
}

/* The cold condensed pages of a group; how many. `*warm`: others may become so. */
static uint32_t candidates(struct tm_ctx *ctx, uint64_t group, bool all, struct view *views, bool *warm)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t n = 0;
    for (uint32_t bit = 0; bit < GROUP; bit++) {
        struct view v = {.slot = at(seg, (group + bit) * 8)};
        v.word = atomic_load_explicit(v.slot, memory_order_acquire);
        uint64_t block = v.word & SLOT_VALUE;
        if (slot_type(v.word) != SLOT_BLOCK || !in_data(seg, block * 16))
            continue;
        if (!all && block_is_warm(seg, block)) {
            *warm = true;
            continue;
        }
        uint64_t header = atomic_load(&block_at(seg, block)->word);
        v.form = block_form(header);
        v.stride = stride_at(seg, block);
        if (header_slot(header) == group + bit && block_kind(header) == BLOCK_ZSTD && v.stride >= TM_STRIDE_MIN
            && v.stride < TM_STRIDE_RAW)
            views[n++] = v;
    }
    return n;
}

static uint32_t mark_of(struct tm_segment *seg, uint64_t group)
{
    uint64_t mark = group;
    for (uint32_t bit = 0; bit < GROUP; bit++)
        mark = (mark ^ (atomic_load_explicit((slot_t *)at(seg, (group + bit) * 8), memory_order_relaxed) & ~SLOT_FREQ))
               * UINT64_C(0x9fb21c651e98df25);
    return (uint32_t)(mark >> 32) | 1;
}

static bool visit_group(struct tm_ctx *ctx, void *memory, uint32_t pool, uint64_t group, bool all)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_packing *t = memory;
    struct view views[GROUP];
    bool warm = false;
    uint32_t mark = mark_of(seg, group), *marked = &t->marks[group / GROUP & t->mask];
    if (*marked == mark)
        return false; /* seen, and not changed since */
    uint32_t n = candidates(ctx, group, all, views, &warm), good = 0;
    if (!warm)
        *marked = mark;
    if (n < 2)
        return false;
    ctx->unpacked.pack = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t block = views[i].word & SLOT_VALUE;
        if (!block_read(ctx, block_at(seg, block), slot_number(seg, views[i].slot), seg->size - block * 16,
                        ctx->unpacked.pages + (size_t)good * TM_PAGE) || slot_changed(views[i].slot, views[i].word))
            continue;
        views[good++] = views[i];
    }
    if (good < 2)
        return true;
    KP(128);
    enum outcome came = pack(ctx, t, pool, views, 0, good);
    if (came == IN_VAIN && good > 2) { /* all are too many for a block: two and two, or two of three */
        came = pack(ctx, t, pool, views, 0, 2);
        if (good == 4 && came != NO_ROOM)
            came = pack(ctx, t, pool, views, 2, 2);
    }
    if (came == NO_ROOM)
        *marked = 0;
    return true;
}

/* May neighbours of this pool be packed? Inside an operation: whoever destroys it, or its packs, waits for us. */
static bool may_pack(struct tm_segment *seg, uint32_t pool)
{
    if (pool >= TM_FIRST_SHARED || is_originals(pool))
        return false;
    const struct tm_pool *p = &seg->pools[pool];
    uint32_t client = payer_of(seg, pool);
    return atomic_load(&p->state) == LIVE && p->persistent && !p->link && atomic_load(&seg->clients[client].state) == LIVE
           && atomic_load_explicit(&seg->clients[client].codec, memory_order_relaxed) != CODEC_NONE
           && !phase_of(seg, client) && atomic_load(&seg->pools[packs_of(pool)].state) == LIVE;
}

/* Each client with persistent pages has a pool of packs. */
static void prepare(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    for (uint32_t id = 0; id < TM_MAX_CLIENTS; id++) {
        uint32_t serial = atomic_load(&seg->clients[id].serial), pool, pool_serial, first = id * TM_CLIENT_POOLS;
        struct pool_wish wish = {.persistent = true, .id = (int)(TM_CLIENT_POOLS - 1)};
        int64_t pages = 0;
        for (uint32_t p = first; p < first + TM_USER_POOLS; p++)
            if (atomic_load(&seg->pools[p].state) == LIVE && seg->pools[p].persistent)
                pages += atomic_load(&seg->pools[p].pages);
        if (pages && atomic_load(&seg->clients[id].state) == LIVE
            && atomic_load(&seg->pools[packs_of(first)].state) == FREE)
            pool_new(ctx, id, serial, &wish, &pool, &pool_serial);
    }
}

void packs_free(struct tm_segment *seg)
{
    struct tm_packing *t = seg->packing.memory;
    if (t)
        free(t->marks);
    free(t);
}

static void *make_packing(const struct tm_segment *seg)
{
    uint64_t size = 1024;
    while (size < (uint64_t)seg->nchunks * 8) /* as many groups as memory has of pages of 2 KiB */
        size *= 2;
    struct tm_packing *t = calloc(1, sizeof *t);
    if (t && (t->marks = calloc(size, sizeof *t->marks))) {
        t->mask = (uint32_t)size - 1;
        return t;
    }
    free(t);
    return NULL;
}

static uint32_t makes_in(const struct tm_segment *seg, uint32_t pool)
{
    (void)seg;
    return packs_of(pool);
}

uint64_t tm_pack(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns)
{
    static const struct tm_walk walk = {.step = GROUP, .may = may_pack, .makes_in = makes_in, .visit = visit_group};
    struct tm_segment *seg = ctx->seg;
    uint64_t began = timing_cpu(), place = 0;
    struct tm_packing *t = atomic_load(&seg->super->pack) ? pass_begin(seg, &seg->packing, make_packing) : NULL;
    if (t) {
        if (!first)
            prepare(ctx);
        place = pass_walk(ctx, &walk, t, first, time_after(began, most_ns), warm);
        pass_end(&seg->packing);
    }
    *spent_ns = timing_cpu() - began;
    atomic_fetch_add_explicit(&seg->super->packing_ns, *spent_ns, memory_order_relaxed);
    return place;
}
