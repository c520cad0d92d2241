/* Levels of zstd on pages of programs, with the core's own code: what memory they take in blocks, what that costs, and what
 * a dictionary would do.
 *
 *   levels PAGES MOST_PAGES LEVEL...
 *
 * Prints JSON. Groups of four neighbours are taken from all over the file, same-filled pages left out. */
#include "tm.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <zdict.h>
#include <zstd.h>

enum { DICTIONARY = 32768, TRAINED_ON = 2048 };

static struct tm_segment seg;
static struct tm_super super;
static struct tm_ctx *ctx;
static uint8_t *pages, *frames, dictionary[DICTIONARY];
static uint32_t *lengths, n;
static size_t dictionary_size;
static uint64_t most_ns; /* of one call */

static uint32_t stride_of(uint32_t length) { return tm_strides[size_class(length)]; }

static uint64_t since(uint64_t began)
{
    uint64_t ns = timing_cpu() - began;
    most_ns = ns > most_ns ? ns : most_ns;
    return ns;
}

static void require(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "levels: %s\n", what);
        exit(1);
    }
}

static uint64_t lz4_bytes(void)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += stride_of(codec_compress(ctx, pages + (size_t)i * TM_PAGE, frames));
    return sum;
}

/* Each page by itself: bytes of blocks; lengths and frames stay. */
static uint64_t alone(int level, double *compress_us, double *expand_us)
{
    uint8_t page[TM_PAGE];
    uint64_t sum = 0, ns = 0, began;
    uint32_t expanded = 0;
    for (uint32_t i = 0; i < n; i++) {
        began = timing_cpu();
        lengths[i] = codec_condense(&seg, level, pages + (size_t)i * TM_PAGE, frames + (size_t)i * TM_SCRATCH);
        ns += since(began);
        sum += stride_of(lengths[i]);
    }
    *compress_us = (double)ns / n / 1000;
    began = timing_cpu();
    for (uint32_t i = 0; i < n; i++)
        if (lengths[i] < TM_PAGE) {
            require(codec_unpack(ctx, frames + (size_t)i * TM_SCRATCH, lengths[i], page, 1), "a page does not come back");
            expanded++;
        }
    *expand_us = (double)(timing_cpu() - began) / expanded / 1000;
    return sum;
}

/* Four neighbours in a frame where that pays, else as alone() has left them. */
static uint64_t packed(int level, double *compress_us)
{
    static uint8_t to[TM_SCRATCH];
    uint64_t sum = 0, ns = 0;
    for (uint32_t i = 0; i < n; i += 4) {
        uint32_t single = 0, head = 5 + 2 * 4; /* as pack.c has it */
        for (uint32_t j = i; j < i + 4; j++)
            single += stride_of(lengths[j]);
        uint64_t began = timing_cpu();
        uint32_t length = codec_pack(&seg, level, pages + (size_t)i * TM_PAGE, 4, to, TM_PAGE - TM_LEAST_GAIN - head);
        ns += since(began);
        uint32_t stride = length ? stride_of(length + head) : single;
        sum += stride < single ? stride : single;
    }
    *compress_us = (double)ns / n / 1000;
    return sum;
}

static uint64_t with_dictionary(int level, double *compress_us, double *expand_us)
{
    uint8_t page[TM_PAGE], frame[TM_SCRATCH];
    ZSTD_CDict *c = ZSTD_createCDict(dictionary, dictionary_size, level);
    ZSTD_DDict *d = ZSTD_createDDict(dictionary, dictionary_size);
    ZSTD_CCtx *condenser = ZSTD_createCCtx();
    ZSTD_DCtx *expander = ZSTD_createDCtx();
    uint64_t sum = 0, ns = 0, expand_ns = 0;
    uint32_t expanded = 0;
    require(c && d && condenser && expander, "no memory");
    for (uint32_t i = 0; i < n; i++) {
        uint64_t began = timing_cpu();
        size_t made = ZSTD_compress_usingCDict(condenser, frame, sizeof frame, pages + (size_t)i * TM_PAGE, TM_PAGE, c);
        ns += timing_cpu() - began;
        require(!ZSTD_isError(made), "a page cannot be compressed");
        /* Without magic number, content size and number of the dictionary, which a block would not have. */
        uint32_t length = (uint32_t)made - 4 - 2 - 4;
        sum += length <= TM_PAGE - TM_LEAST_GAIN ? stride_of(length) : TM_STRIDE_RAW;
        began = timing_cpu();
        require(ZSTD_decompress_usingDDict(expander, page, TM_PAGE, frame, made, d) == TM_PAGE, "a page does not come back");
        expand_ns += timing_cpu() - began;
        expanded++;
    }
    *compress_us = (double)ns / n / 1000;
    *expand_us = (double)expand_ns / expanded / 1000;
    ZSTD_freeCDict(c);
    ZSTD_freeDDict(d);
    ZSTD_freeCCtx(condenser);
    ZSTD_freeDCtx(expander);
    return sum;
}

int main(int argc, char **argv)
{
    struct stat st;
    uint64_t fill;
    require(argc > 3, "usage: levels PAGES MOST_PAGES LEVEL...");
    int fd = open(argv[1], O_RDONLY);
    require(fd >= 0 && !fstat(fd, &st) && st.st_size >= 4 * (off_t)TM_PAGE, "cannot read the pages");
    const uint8_t *all = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    require(all != MAP_FAILED, "cannot map the pages");
    uint64_t groups = (uint64_t)st.st_size / TM_PAGE / 4, most = strtoull(argv[2], NULL, 10) / 4;
    uint64_t step = groups > most ? groups / most : 1;
    seg.super = &super;
    ctx = aligned_alloc(_Alignof(struct tm_ctx), (sizeof *ctx + 63) / 64 * 64);
    pages = malloc((size_t)(most + 1) * 4 * TM_PAGE);
    frames = malloc((size_t)(most + 1) * 4 * TM_SCRATCH);
    lengths = malloc((size_t)(most + 1) * 4 * sizeof *lengths);
    require(ctx && pages && frames && lengths, "no memory");
    ctx->expander = codec_expander();
    for (uint64_t g = 0; g < groups && n < most * 4; g += step) {
        bool same = false;
        for (unsigned i = 0; i < 4; i++)
            same = same || codec_fill(all + (g * 4 + i) * TM_PAGE, &fill);
        if (same)
            continue;
        memcpy(pages + (size_t)n * TM_PAGE, all + g * 4 * TM_PAGE, 4 * (size_t)TM_PAGE);
        n += 4;
    }
    require(n > TRAINED_ON, "too few pages");
    static size_t sizes[TRAINED_ON];
    uint8_t *samples = malloc((size_t)TRAINED_ON * TM_PAGE);
    require(samples != NULL, "no memory");
    for (uint32_t i = 0; i < TRAINED_ON; i++) {
        memcpy(samples + (size_t)i * TM_PAGE, pages + (size_t)((uint64_t)i * n / TRAINED_ON) * TM_PAGE, TM_PAGE);
        sizes[i] = TM_PAGE;
    }
    dictionary_size = ZDICT_trainFromBuffer(dictionary, DICTIONARY, samples, sizes, TRAINED_ON);
    require(!ZDICT_isError(dictionary_size), "no dictionary can be made of them");
    double lz4 = (double)lz4_bytes();
    printf("{\"pages\": %u, \"lz4_ratio\": %.4f, \"levels\": [", n, (double)n * TM_PAGE / lz4);
    for (int i = 3; i < argc; i++) {
        int level = atoi(argv[i]);
        double us, expand_us, pack_us, dictionary_us, dictionary_expand_us;
        most_ns = 0;
        codec_close(&seg);
        atomic_store(&seg.condenser_bytes, 0);
        double single = lz4 / (double)alone(level, &us, &expand_us), four = lz4 / (double)packed(level, &pack_us);
        double trained = lz4 / (double)with_dictionary(level, &dictionary_us, &dictionary_expand_us);
        printf("%s\n {\"level\": %d, \"alone\": %.4f, \"dictionary\": %.4f, \"packed\": %.4f, \"compress_us\": %.2f, "
               "\"expand_us\": %.2f, \"pack_us\": %.2f, \"dictionary_us\": %.2f, \"dictionary_expand_us\": %.2f, "
               "\"most_us\": %.0f, \"memory_bytes\": %llu}",
               i > 3 ? "," : "", level, single, trained, four, us, expand_us, pack_us, dictionary_us, dictionary_expand_us,
               (double)most_ns / 1000, (unsigned long long)atomic_load(&seg.condenser_bytes));
        fflush(stdout);
    }
    printf("]}\n");
    return 0;
}
