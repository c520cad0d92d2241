/* Packs: cold neighbours of persistent pools together in one block, which takes less than one for each.
 *
 * A PACK is a page of a pool of the core's own (packs_of), with a slot and so a block as any page has: repair, moving and
 * the end of pools know nothing of it. Its block has one zstd frame of two to four pages of a GROUP, four aligned slots of a
 * leaf; the block says which group, and which of its slots. A page in it is a slot of type PACKED that names the pack's
 * slot: which of the pages is its own follows from its own number. So one slot still owns one block, and nobody counts
 * who is in a pack: only four slots can name it, and they are the only truth.
 *
 * What must not meet is making slots name a pack, and removing it because none does: both hold `twin_lock` (twin.c), from
 * before the pack is there until all its pages name it. Everything else is a swap of one slot: a page that is put, flushed, or
 * sent to a tier leaves the pack; one whose pages would take less by themselves is taken apart, which is what a put of the
 * same bytes would do.
 * A death anywhere leaves a pack too much, or one with fewer pages, never a slot that names none.
 *
 * A reader looks at the page's slot again after it has read the pack, as with twins, and at the pack's own, whose block may
 * be moved meanwhile. The pages that it has expanded stay in its context, for who asks for the next one. */
#include "tm.h"

#include <string.h>

enum {
    GROUP = TM_GROUP,
    RESCUES = 16 /* packs that are removed for a put that finds no memory, before it tries again */
};

/* What the header and the head of the pack in a block say, neither of which is verified here. */
struct pack {
    const struct tm_block *block;
    uint64_t header, group;
    uint32_t members, length, stamp, checksum;
    uint8_t own[GROUP], before[GROUP]; /* of the pages, in their order */
};

static bool parse(const struct tm_block *b, uint64_t most, struct pack *p)
{
    const uint8_t *payload = (const uint8_t *)(b + 1);
    p->block = b;
    p->header = atomic_load_explicit(&b->word, memory_order_acquire);
    p->stamp = atomic_load_explicit(&b->stamp, memory_order_relaxed);
    p->checksum = b->checksum;
    p->length = block_length(p->header);
    p->members = form_members(block_form(p->header)) & ((1u << GROUP) - 1);
    if (block_kind(p->header) != BLOCK_PACK || p->length <= pack_head(p->members) || p->length > TM_PAGE
        || p->length > most - TM_HEADER)
        return false;
    p->group = 0;
    memcpy(&p->group, payload, PACK_NUMBER);
    for (uint32_t i = 0; i < pack_count(p->members); i++) {
        p->own[i] = payload[PACK_NUMBER + PACK_OF_EACH * i];
        p->before[i] = payload[PACK_NUMBER + PACK_OF_EACH * i + 1];
    }
    return p->group % GROUP == 0;
}

/* The pack that `slot` of a pool of packs holds, if it is as `word` says. */
static bool look(struct tm_segment *seg, const slot_t *slot, uint64_t word, struct pack *p)
{
    uint64_t block = word & SLOT_VALUE;
    return slot_type(word) == SLOT_BLOCK && in_data(seg, block * 16)
           && parse(block_at(seg, block), seg->size - block * 16, p) && header_slot(p->header) == slot_number(seg, slot);
}

static slot_t *pack_of(struct tm_segment *seg, uint32_t pool, uint64_t word)
{
    uint64_t number = word & SLOT_VALUE;
    return !is_originals(pool) && pool < TM_FIRST_SHARED && slot_pool(seg, number) == (int)packs_of(pool)
               ? at(seg, number * 8) : NULL;
}

/* ---- Reading ---------------------------------------------------------------------------------------------- */

/* Have the pages of a pack in ctx->unpacked. They count only if the slot still is as it was: settle() says so then. */
static bool expand(struct tm_ctx *ctx, const slot_t *slot, uint64_t word, const struct pack *p)
{
    uint64_t number = slot_number(ctx->seg, slot);
    bool same = !((ctx->unpacked.word ^ word) & ~SLOT_FREQ) && ctx->unpacked.header == p->header
                && ctx->unpacked.stamp == p->stamp && ctx->unpacked.checksum == p->checksum;
    if (ctx->unpacked.pack == number && (same || MUTANT(58)))
        return true;
    const uint8_t *payload = (const uint8_t *)(p->block + 1);
    uint32_t head = pack_head(p->members);
    ctx->unpacked.pack = 0;
    if (p->checksum != block_checksum(p->block, p->header, p->stamp))
        return false;
    KP(46);
    ctx->unpacked.group = p->group;
    return codec_unpack(ctx, payload + head, p->length - head, ctx->unpacked.pages, pack_count(p->members));
}

static void settle(struct tm_ctx *ctx, const slot_t *slot, uint64_t word, const struct pack *p)
{
    ctx->unpacked.pack = slot_number(ctx->seg, slot);
    ctx->unpacked.word = word;
    ctx->unpacked.header = p->header;
    ctx->unpacked.stamp = p->stamp;
    ctx->unpacked.checksum = p->checksum;
}

/* The page of member `bit`, among those that are expanded. */
static const uint8_t *page_of(const struct tm_ctx *ctx, uint32_t members, uint32_t bit)
{
    return ctx->unpacked.pages + (size_t)pack_count(members & ((1u << bit) - 1)) * TM_PAGE;
}

int pack_get(struct tm_ctx *ctx, uint32_t pool, const slot_t *slot, uint64_t word, uint8_t *page)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t number = slot_number(seg, slot);
    uint32_t bit = (uint32_t)(number % GROUP);
    const slot_t *holder = pack_of(seg, pool, word);
    struct pack p;
    KP(120);
    if (!holder)
        return TM_CORRUPT;
    for (;;) {
        uint64_t named = atomic_load_explicit(holder, memory_order_acquire);
        bool good = look(seg, holder, named, &p) && p.members >> bit & 1 && expand(ctx, holder, named, &p)
                    && ctx->unpacked.group == number - bit;
        atomic_thread_fence(memory_order_acquire);
        if (slot_changed(holder, named) && !MUTANT(53)) {
            ctx->unpacked.pack = 0;
            continue; /* it was moved; if not, the block was ours to read all the time */
        }
        if (!good)
            return TM_CORRUPT;
        settle(ctx, holder, named, &p);
        memcpy(page, page_of(ctx, p.members, bit), TM_PAGE);
        note_touched(seg, named & SLOT_VALUE);
        return TM_OK;
    }
}

bool pack_holds(struct tm_ctx *ctx, const struct tm_block *b, uint64_t number)
{
    struct pack p;
    uint64_t most = ctx->seg->size - off(ctx->seg, b);
    if (!parse(b, most, &p) || p.checksum != block_checksum(b, p.header, p.stamp))
        return false;
    ctx->unpacked.pack = 0;
    uint32_t head = pack_head(p.members);
    return (!number || (p.group == number / GROUP * GROUP && p.members >> number % GROUP & 1))
           && codec_unpack(ctx, (const uint8_t *)(b + 1) + head, p.length - head, ctx->unpacked.pages, pack_count(p.members));
}

uint32_t pack_stamp(struct tm_segment *seg, uint32_t pool, const slot_t *slot, uint64_t word)
{
    struct pack p;
    uint64_t number = slot_number(seg, slot);
    const slot_t *holder = pack_of(seg, pool, word);
    return holder && look(seg, holder, atomic_load(holder), &p) && p.group == number / GROUP * GROUP ? p.stamp : 0;
}

/* ---- What becomes of packs ---------------------------------------------------------------------------------- */

/* The slot of member `bit` of the group, if it names that pack of `packs`; or NULL. */
static slot_t *member(struct tm_segment *seg, uint32_t packs, uint64_t number, uint64_t group, uint32_t bit, uint64_t *word,
                      uint32_t *pool)
{
    if (!in_data(seg, (group + bit) * 8))
        return NULL;
    slot_t *slot = at(seg, (group + bit) * 8);
    *word = atomic_load(slot);
    if (slot_type(*word) != SLOT_PACKED || (*word & SLOT_VALUE) != number)
        return NULL;
    int found = leaf_pool(seg, group + bit);
    if (found < 0 || is_originals((uint32_t)found) || found >= (int)TM_FIRST_SHARED || packs_of((uint32_t)found) != packs)
        return NULL;
    *pool = (uint32_t)found;
    return slot;
}

static uint32_t named(struct tm_segment *seg, uint32_t packs, uint64_t number, uint64_t group)
{
    uint32_t members = 0, pool;
    uint64_t word;
    for (uint32_t bit = 0; bit < GROUP; bit++)
        if (member(seg, packs, number, group, bit, &word, &pool))
            members |= 1u << bit;
    return members;
}

void pack_lose(struct tm_segment *seg, int64_t pages)
{
    int64_t now = atomic_load_explicit(&seg->super->pack_losses, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&seg->super->pack_losses, &now, now + pages > 0 ? now + pages : 0,
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
}

bool pack_remove(struct tm_ctx *ctx, uint32_t packs, slot_t *slot, unsigned *patience)
{
    struct tm_segment *seg = ctx->seg;
    struct pack p;
    if (!MUTANT(51) && !twins_lock_within(seg, patience)) {
        if (!MUTANT(68))
            note_orphans(seg, ORPHAN_PACKS); /* a put that needs its memory looks again */
        return false;
    }
    KP(125);
    uint64_t word = atomic_load(slot);
    bool gone = look(seg, slot, word, &p)
                && (!named(seg, packs, slot_number(seg, slot), p.group) || MUTANT(55) || MUTANT(62))
                && slot_replace(ctx, packs, slot, &word, slot_next(word, SLOT_EMPTY, 0));
    KP(126);
    if (!MUTANT(51))
        twins_unlock(seg);
    if (gone) {
        look_for_empty(seg);
        pack_lose(seg, -(int64_t)pack_count(p.members));
    }
    return gone;
}

/* The whole group is in one cache line, which was just written. What is seen here may change at once, and another pack come
 * to that place: pack_remove looks again. If somebody else has the lock, who comes by next removes it. */
void pack_left(struct tm_ctx *ctx, uint32_t pool, const slot_t *slot, uint64_t word)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t group = slot_number(seg, slot) / GROUP * GROUP;
    slot_t *holder = pack_of(seg, pool, word);
    pack_lose(seg, 1);
    note_orphans(seg, ORPHAN_PACKS);
    if (!holder || MUTANT(63))
        return;
    for (uint32_t bit = 0; bit < GROUP; bit++) {
        uint64_t other = atomic_load_explicit((slot_t *)at(seg, (group + bit) * 8), memory_order_relaxed);
        if (slot_type(other) == SLOT_PACKED && (other & SLOT_VALUE) == (word & SLOT_VALUE))
            return;
    }
    KP(130);
    pack_remove(ctx, packs_of(pool), holder, NULL);
}

/* A block for a page that leaves its pack: of its size, or a larger hole, or, if a put waits for what comes free then, where
 * hot pages are moved to. */
static uint64_t place_for(struct tm_ctx *ctx, uint32_t bin, bool urgent)
{
    uint64_t block = block_spare(ctx, bin);
    for (uint32_t more = bin + 1; !block && more < BIN_PERSISTENT + TM_NCLASSES - 1; more++)
        if (atomic_load_explicit(&ctx->seg->bins[more].room, memory_order_relaxed))
            block = block_alloc(ctx, more, ALLOC_LISTED);
    return block || !urgent ? block : block_alloc(ctx, bin, ALLOC_RESERVE);
}

/* Give the page of this slot a block of its own; the bytes of that, 0: it has none. */
static uint32_t unpack(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, const uint8_t *page,
                       enum block_kind kind, uint32_t before, uint64_t pack, struct tm_condensed *found)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t length = kind == BLOCK_ZSTD ? codec_condense(seg, LEVEL_AT_ONCE, page, ctx->packed)
                                         : codec_compress(ctx, page, ctx->packed);
    uint32_t form = kind == BLOCK_ZSTD ? BLOCK_ZSTD | before << 3 : kind;
    const uint8_t *payload = ctx->packed;
    if (length == TM_PAGE) {
        form = BLOCK_RAW;
        payload = page;
    }
    uint32_t bin = BIN_PERSISTENT + size_class(length);
    bool urgent = kind == BLOCK_LZ4;
    if (!urgent && !has_cap_for(seg, payer_of(seg, pool), bin_stride(bin)))
        return 0;
    uint64_t block = place_for(ctx, bin, urgent);
    if (!block)
        return 0;
    block_write(block_at(seg, block), slot_number(seg, slot), form, length, payload);
    KP(123);
    if (MUTANT(54))
        word = atomic_load(slot);
    uint32_t stride = stride_at(seg, block);
    if (!slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_BLOCK, block) | (word & SLOT_FREQ))) {
        block_free_new(ctx);
        return 0;
    }
    KP(124);
    atomic_fetch_add_explicit(&seg->super->unpacked, 1, memory_order_relaxed);
    note_touched(seg, block); /* or it would be packed again at once */
    if (found && block < pack && kind == BLOCK_ZSTD) { /* else the round comes by yet */
        found->pages++;
        if (before && before <= TM_NCLASSES)
            found->saved += (int64_t)tm_strides[before - 1] - stride;
    }
    return stride;
}

/* Take a pack apart; the number of pages that have blocks of their own now, which are counted to `found`. For a put that
 * finds no memory as LZ4 (zstd would ask the system for some), and only if that takes less than the pack. A page's slot counts
 * only if the pack is seen to be there still after it was read: else another pack of the same pages may have come to its place. */
static uint32_t take_apart(struct tm_ctx *ctx, uint32_t packs, slot_t *slot, uint64_t word, enum block_kind kind,
                           struct tm_condensed *found, unsigned *patience)
{
    struct tm_segment *seg = ctx->seg;
    struct pack p;
    uint64_t number = slot_number(seg, slot);
    uint32_t done = 0, pool, bytes = 0, all = 0;
    if (!look(seg, slot, word, &p) || !expand(ctx, slot, word, &p))
        return 0;
    atomic_thread_fence(memory_order_acquire);
    if (slot_changed(slot, word)) {
        ctx->unpacked.pack = 0;
        return 0;
    }
    settle(ctx, slot, word, &p);
    KP(129);
    uint32_t stride = stride_at(seg, word & SLOT_VALUE);
    for (uint32_t bit = 0; bit < GROUP; bit++) {
        uint64_t theirs;
        slot_t *one = p.members >> bit & 1 ? member(seg, packs, number, p.group, bit, &theirs, &pool) : NULL;
        if (!one)
            continue;
        all++;
        if (slot_changed(slot, word) && !MUTANT(61))
            break;
        const uint8_t *page = page_of(ctx, p.members, bit);
        if (kind == BLOCK_LZ4 && (bytes += tm_strides[size_class(codec_compress(ctx, page, ctx->packed))]) >= stride)
            break;
        if (!unpack(ctx, pool, one, theirs, page, kind, p.before[pack_count(p.members & ((1u << bit) - 1))],
                    word & SLOT_VALUE, found))
            break;
        done++;
    }
    if (done == all)
        pack_remove(ctx, packs, slot, patience);
    return done;
}

/* What those of its pages that are there would take by themselves. */
static uint32_t own_bytes(const struct pack *p, uint32_t living)
{
    uint32_t sum = 0;
    for (uint32_t bit = 0, i = 0; bit < GROUP; bit++)
        if (p->members >> bit & 1) {
            sum += living >> bit & 1 ? tm_strides[p->own[i] % TM_NCLASSES] : 0u;
            i++;
        }
    return sum;
}

static bool is_worn(const struct pack *p, uint32_t living, uint32_t stride)
{
    return own_bytes(p, living) + PACK_LEAST_GAIN <= stride;
}

static void count_pack(const struct pack *p, uint32_t living, uint32_t stride, struct tm_condensed *found)
{
    for (uint32_t bit = 0, i = 0; bit < GROUP; bit++) {
        if (!(p->members >> bit & 1))
            continue;
        uint32_t own = p->own[i] % TM_NCLASSES, before = p->before[i];
        i++;
        if (!(living >> bit & 1))
            continue;
        found->pages++;
        found->packed++;
        found->packed_saved += tm_strides[own];
        if (before && before <= TM_NCLASSES)
            found->saved += (int64_t)tm_strides[before - 1] - tm_strides[own];
    }
    found->packed_saved -= stride;
}

void pack_tend(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, bool hot, struct tm_condensed *found)
{
    struct tm_segment *seg = ctx->seg;
    struct pack p;
    if (!look(seg, slot, word, &p))
        return;
    uint32_t stride = stride_at(seg, word & SLOT_VALUE);
    uint32_t living = named(seg, pool, slot_number(seg, slot), p.group);
    if (!living || MUTANT(55)) {
        pack_remove(ctx, pool, slot, NULL);
        return;
    }
    if (hot || (is_worn(&p, living, stride) && !MUTANT(59))) {
        take_apart(ctx, pool, slot, word, BLOCK_ZSTD, found, NULL);
        word = atomic_load(slot);
        if (!look(seg, slot, word, &p))
            return;
        stride = stride_at(seg, word & SLOT_VALUE);
        living = named(seg, pool, slot_number(seg, slot), p.group);
    }
    if (found && living)
        count_pack(&p, living, stride, found);
}

/* The page that is left of a pack takes a third of it; to get that costs 35 us, and to move the pack 11. Of two pages less is
 * got for more, so memory comes back sooner without. */
void pack_gather(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word)
{
    struct tm_segment *seg = ctx->seg;
    struct pack p;
    if (!look(seg, slot, word, &p))
        return;
    uint32_t living = named(seg, pool, slot_number(seg, slot), p.group);
    if (!living)
        pack_remove(ctx, pool, slot, NULL);
    else if (own_bytes(&p, living) * 2 <= stride_at(seg, word & SLOT_VALUE))
        take_apart(ctx, pool, slot, word, BLOCK_ZSTD, NULL, NULL);
}

/* Tend the packs of chunk `c`, inside an operation. */
static void tend_chunk(struct tm_ctx *ctx, uint32_t c)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = d->bin, stride = bin_stride(bin);
    if (atomic_load(&seg->states[c]) != CHUNK_USED || bin >= BIN_PERSISTENT + TM_NCLASSES)
        return;
    for (uint32_t bit = 0; bit < TM_CHUNK / stride; bit++) {
        if (!bit_is_set(d, bit))
            continue;
        uint64_t block = (seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride) / 16;
        uint64_t header = atomic_load(&block_at(seg, block)->word), number = header_slot(header);
        int pool = block_kind(header) == BLOCK_PACK ? slot_pool(seg, number) : -1;
        slot_t *slot = pool < 0 ? NULL : at(seg, number * 8);
        uint64_t word = slot ? atomic_load(slot) : 0;
        if (slot && is_packs((uint32_t)pool) && slot_refers(word, block))
            pack_tend(ctx, (uint32_t)pool, slot, word, false, NULL);
    }
}

uint64_t tm_unpack(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, uint64_t *spent_ns)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t began = timing_cpu(), now = began;
    uint32_t c = (uint32_t)(first / TM_PLACES);
    ctx->client = ctx->payer = TM_MAX_CLIENTS; /* on nobody's behalf */
    for (unsigned idle = 0; c < seg->nchunks && now - began < most_ns; c++) {
        if (atomic_load_explicit(&seg->states[c], memory_order_relaxed) != CHUNK_USED
            || seg->chunks[c].bin >= BIN_PERSISTENT + TM_NCLASSES) {
            if (++idle % 1024 == 0)
                now = timing_cpu();
            continue;
        }
        op_begin(ctx);
        tend_chunk(ctx, c);
        op_end(ctx);
        now = timing_cpu();
    }
    *spent_ns = timing_cpu() - began;
    atomic_fetch_add_explicit(&seg->super->packing_ns, *spent_ns, memory_order_relaxed);
    return c < seg->nchunks ? (uint64_t)c * TM_PLACES : 0;
}

/* Leaves of packs of chunk `c`: remove what no slot names, and take apart what is not needed as it is. */
static uint32_t rescue_chunk(struct tm_ctx *ctx, uint32_t c, uint32_t most, unsigned *patience)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = d->bin, freed = 0;
    if (atomic_load(&seg->states[c]) != CHUNK_USED || bin < BIN_LEAF || !is_packs((bin - BIN_LEAF) / 3))
        return 0;
    uint32_t pool = (bin - BIN_LEAF) / 3, stride = bin_stride(bin);
    uint64_t first = (seg->data_offset + (uint64_t)c * TM_CHUNK) / 8;
    for (uint64_t i = 0; i < TM_CHUNK / stride * stride / 8 && freed < most; i++) {
        slot_t *slot = at(seg, (first + i) * 8);
        uint64_t word = atomic_load(slot);
        struct pack p;
        if (leaf_pool(seg, first + i) != (int)pool || !look(seg, slot, word, &p))
            continue;
        uint32_t living = named(seg, pool, slot_number(seg, slot), p.group);
        if (!living)
            freed += pack_remove(ctx, pool, slot, patience);
        else if (is_worn(&p, living, stride_at(seg, word & SLOT_VALUE)))
            freed += take_apart(ctx, pool, slot, word, BLOCK_LZ4, NULL, patience) == pack_count(living);
    }
    return freed;
}

bool packs_rescue(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t freed = 0;
    unsigned patience = TWINS_PATIENCE;
    if (!(atomic_load_explicit(&seg->super->orphans, memory_order_relaxed) & ORPHAN_PACKS) || MUTANT(57))
        return false;
    atomic_fetch_and(&seg->super->orphans, ~ORPHAN_PACKS); /* before we look; and not for every put that is refused */
    for (uint32_t c = 0; c < seg->nchunks && freed < RESCUES; c++)
        freed += rescue_chunk(ctx, c, RESCUES - freed, &patience);
    if (freed) /* there may be more where we stopped */
        note_orphans(seg, ORPHAN_PACKS);
    return freed;
}
