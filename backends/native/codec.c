/* From a page to what is stored and back: a same-filled word in the slot, an LZ4 block, the page as it is, or what the
 * background pass makes of pages that nobody asked for in a while, a zstd frame without its magic number.
 *
 * zstd at level 3 unless another one is set: on 144,000 anonymous pages of programs 1.66 times LZ4's ratio after
 * rounding to size classes, for 13 to 21 us a page, and 5 to 8 us to expand one; docs/design.md has the others, and
 * dictionaries. To expand a page nothing has to be known of its level. */
#include "tm.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lz4.h>
#include <string.h>
#include <zstd.h>

/* Fill values have 36 bits: with bit 35 a 64-bit word below 2^35, without it a 32-bit pattern. */
#define FILL_WIDE (UINT64_C(1) << 35)
#define WORD_FORM(w) ((uint32_t)((w) >> 53))
#define WORD_LENGTH(w) ((uint32_t)((w) >> 40) & 0x1fffu)

bool codec_fill(const uint8_t *page, uint64_t *value)
{
    uint64_t first, word;
    memcpy(&first, page, 8);
    memcpy(&word, page + TM_PAGE - 8, 8);
    /* Most pages are settled by one look at the other end. */
    if (first != word || memcmp(page, page + 8, TM_PAGE - 8) != 0)
        return false;
    if ((uint32_t)first == (uint32_t)(first >> 32))
        *value = (uint32_t)first;
    else if (first < FILL_WIDE)
        *value = first | FILL_WIDE;
    else
        return false;
    return true;
}

void codec_expand(uint64_t value, uint8_t *page)
{
    uint64_t word = value & FILL_WIDE ? value & (FILL_WIDE - 1) : (value & 0xffffffffu) * UINT64_C(0x100000001);
    if (word == 0) {
        memset(page, 0, TM_PAGE);
        return;
    }
    for (uint32_t i = 0; i < TM_PAGE; i += 8)
        memcpy(page + i, &word, 8);
}

uint32_t codec_compress(struct tm_ctx *ctx, const uint8_t *page, uint8_t *to)
{
        const int most = (int)(TM_PAGE - TM_LEAST_GAIN);
    int n = LZ4_compress_fast_extState(ctx->lz4, (const char *)page, (char *)to, (int)TM_PAGE, most, 1);
    return n > 0 ? (uint32_t)n : TM_PAGE;
}

enum { MAGIC = 4 };
static const uint8_t magic[MAGIC] = {0x28, 0xb5, 0x2f, 0xfd};

int condense_level(const struct tm_segment *seg)
{
    uint32_t level = atomic_load_explicit(&seg->super->condense_level, memory_order_relaxed);
    return !level ? LEVEL_USUAL : level > LEVEL_MOST ? LEVEL_MOST : (int)level;
}

/* States for compression belong to the process, not to its threads: at high levels one takes up to a MiB, and any thread
 * of the manager may come to run a pass. So there are as many as are in use at once, and their memory is counted. */
static ZSTD_CCtx *take_condenser(struct tm_segment *seg)
{
    for (unsigned i = 0; i < TM_CONDENSERS; i++) {
        ZSTD_CCtx *taken = atomic_exchange(&seg->condensers[i], NULL);
        if (taken)
            return taken;
    }
    ZSTD_CCtx *made = ZSTD_createCCtx();
    atomic_fetch_add_explicit(&seg->condenser_bytes, ZSTD_sizeof_CCtx(made), memory_order_relaxed); /* 0 of NULL */
    return made;
}

static void give_condenser(struct tm_segment *seg, ZSTD_CCtx *condenser)
{
    for (unsigned i = 0; i < TM_CONDENSERS; i++) {
        void *none = NULL;
        if (atomic_compare_exchange_strong(&seg->condensers[i], &none, condenser))
            return;
    }
    atomic_fetch_sub_explicit(&seg->condenser_bytes, ZSTD_sizeof_CCtx(condenser), memory_order_relaxed);
    ZSTD_freeCCtx(condenser);
}

uint32_t codec_pack(struct tm_segment *seg, int level, const uint8_t *pages, uint32_t n, uint8_t *to, uint32_t most)
{
    uint8_t frame[TM_SCRATCH];
    ZSTD_CCtx *condenser = take_condenser(seg);
    if (!condenser)
        return 0;
    size_t before = ZSTD_sizeof_CCtx(condenser);
    ZSTD_CCtx_setParameter(condenser, ZSTD_c_compressionLevel, level);
    ZSTD_CCtx_setParameter(condenser, ZSTD_c_contentSizeFlag, 0);
    size_t made = ZSTD_compress2(condenser, frame, most + MAGIC, pages, (size_t)n * TM_PAGE);
    atomic_fetch_add_explicit(&seg->condenser_bytes, ZSTD_sizeof_CCtx(condenser) - before, memory_order_relaxed);
    give_condenser(seg, condenser);
    if (ZSTD_isError(made) || memcmp(frame, magic, MAGIC) != 0)
        return 0;
    memcpy(to, frame + MAGIC, made - MAGIC);
    return (uint32_t)made - MAGIC;
}

uint32_t codec_condense(struct tm_segment *seg, int level, const uint8_t *page, uint8_t *to)
{
    uint32_t length = codec_pack(seg, level, page, 1, to, TM_PAGE - TM_LEAST_GAIN);
    return length ? length : TM_PAGE;
}

bool codec_unpack(struct tm_ctx *ctx, const uint8_t *payload, uint32_t length, uint8_t *pages, uint32_t n)
{
    uint8_t frame[TM_SCRATCH];
    memcpy(frame, magic, MAGIC);
    memcpy(frame + MAGIC, payload, length); /* at most a page: the caller has looked */
    return ZSTD_decompressDCtx(ctx->expander, pages, (size_t)n * TM_PAGE, frame, MAGIC + length) == (size_t)n * TM_PAGE;
}

void *codec_expander(void)
{
    ZSTD_DCtx *made = ZSTD_createDCtx();
    /* Backed now: a swap-in must not wait for memory. */
    for (size_t i = 0, size = made ? ZSTD_sizeof_DCtx(made) : 0; i < size; i += TM_PAGE) {
        volatile uint8_t *byte = (volatile uint8_t *)made + i;
        *byte = *byte;
    }
    return made;
}

void codec_expander_free(void *expander) { ZSTD_freeDCtx(expander); }

void codec_close(struct tm_segment *seg)
{
    for (unsigned i = 0; i < TM_CONDENSERS; i++)
        ZSTD_freeCCtx(atomic_exchange(&seg->condensers[i], NULL));
}

static uint64_t checksum_plain(const uint8_t *data, size_t length) { return XXH3_64bits(data, length); }

static uint64_t checksum_plain_copy(const uint8_t *page, uint8_t *to, const uint8_t *next)
{
    (void)next;
    memcpy(to, page, TM_PAGE);
    return XXH3_64bits(to, TM_PAGE);
}

static uint64_t (*hash)(const uint8_t *data, size_t length) = checksum_plain;
static uint64_t (*hash_copy)(const uint8_t *page, uint8_t *to, const uint8_t *next) = checksum_plain_copy;

/* When the library is loaded, so that no call has to ask. */
__attribute__((constructor)) static void choose_hash(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        hash = checksum_wide;
        hash_copy = checksum_wide_copy;
    }
#endif
}

uint64_t codec_checksum(const uint8_t *data, size_t length) { return hash(data, length); }

/* The back reference and stamp are mixed in after hashing: seeding XXH3 costs it a secret of its own. */
static uint32_t mixed(uint64_t h, uint64_t word, uint32_t stamp)
{
    h ^= word ^ (uint64_t)stamp << 21;
    h *= UINT64_C(0x9fb21c651e98df25);
    return (uint32_t)(h >> 32);
}

static uint32_t checksum(const uint8_t *payload, uint32_t length, uint64_t word, uint32_t stamp)
{
    return mixed(hash(payload, length), word, stamp);
}

uint32_t block_checksum(const struct tm_block *b, uint64_t word, uint32_t stamp)
{
    return checksum((const uint8_t *)(b + 1), WORD_LENGTH(word), word, stamp);
}

uint32_t block_length(uint64_t word) { return WORD_LENGTH(word); }
uint32_t block_form(uint64_t word) { return WORD_FORM(word); }
enum block_kind block_kind(uint64_t word) { return (enum block_kind)(WORD_FORM(word) & 7u); }

void block_write(struct tm_block *b, uint64_t slot, uint32_t form, uint32_t length, const uint8_t *payload)
{
    uint64_t word = slot | (uint64_t)length << 40 | (uint64_t)form << 53;
    /* Read first: where this process has not mapped the page yet, a read has the kernel map its neighbours too, a write does
     * not (3 of 34 us of a miss that is put). */
    (void)*((const volatile uint8_t *)(b + 1) + length - 1);
    memcpy(b + 1, payload, length);
    /* From the source, which is warm. */
    b->checksum = checksum(payload, length, word, atomic_load_explicit(&b->stamp, memory_order_relaxed));
    atomic_store_explicit(&b->word, word, memory_order_release);
}

bool block_read(struct tm_ctx *ctx, const struct tm_block *b, uint64_t slot, uint64_t most, uint8_t *page)
{
    uint64_t word = atomic_load_explicit(&b->word, memory_order_acquire);
    uint32_t stamp = atomic_load_explicit(&b->stamp, memory_order_relaxed);
    uint32_t length = WORD_LENGTH(word);
    const uint8_t *payload = (const uint8_t *)(b + 1);
    if (header_slot(word) != slot || length > most - TM_HEADER || length > TM_PAGE)
        return false;
    enum block_kind kind = block_kind(word);
    bool whole = length == TM_PAGE && (kind == BLOCK_RAW || kind == BLOCK_LOOSE);
    /* Alone it is better hashed first and copied from the cache then: 2.1 to 2.2 us instead of 2.0 for one at random. */
    if (whole && ctx->next_payload)
        return b->checksum == mixed(hash_copy(payload, page, ctx->next_payload), word, stamp);
    if (b->checksum != checksum(payload, length, word, stamp))
        return false;
    KP(46);
    switch (kind) {
    case BLOCK_LZ4:
        /* No copy first: if the block is reused meanwhile, the slot has changed and the caller tries again. */
        return LZ4_decompress_safe((const char *)payload, (char *)page, (int)length, (int)TM_PAGE) == (int)TM_PAGE;
    case BLOCK_RAW:
    case BLOCK_LOOSE:
        memcpy(page, payload, TM_PAGE);
        return length == TM_PAGE;
    case BLOCK_ZSTD:
        return codec_unpack(ctx, payload, length, page, 1);
    case BLOCK_PACK: /* of several: pack.c */
        return false;
    }
    return false;
}
