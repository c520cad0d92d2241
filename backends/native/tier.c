/* Pages that are in a tier: reading their records, beside everybody else.
 *
 * A slot of type TIER names a location, which means something to the client's tier alone. An operation that meets one
 * cannot wait for a disk or a network: it ends with TM_AWAY. The thread then fetches the record into its WINDOW,
 * outside of every operation and lock, and begins the operation anew, which finds the record there. As with a block
 * in memory, what was read counts only if the slot still is as it was.
 *
 * That is enough only if a location is not written anew while somebody may still believe it: leaves are used again
 * and their generations begin anew, so the same word may come to mean another record. Hence the mark `fetching` in
 * the thread record (a hazard pointer for all locations of a client at once). A reader makes it odd, *then* looks at
 * the slot again: if it still names the location, nobody who finds it unnamed from now on uses it again before the
 * mark is even (`tier_grace`). A dead reader's mark is ended by its repair; one that is stopped, or hangs, delays only,
 * and only what its own client's tier holds: locations of different clients have nothing to do with each other.
 *
 * A record is a block as it lay in memory, but its stamp tells the generation of the slot and the life of the
 * segment, and its checksum goes over that: another version of the page, another page, and another segment's pages
 * are found out like a flipped bit. Three reads of a wrong record are corruption. */
#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

uint32_t tier_stamp(const struct tm_segment *seg, uint64_t word)
{
    uint64_t nonce = seg->super->nonce;
    return (uint32_t)(word >> 41) * 2654435761u ^ (uint32_t)nonce ^ (uint32_t)(nonce >> 32);
}

/* What the next fetch shall bring. */
void tier_want(struct tm_ctx *ctx, uint64_t location)
{
    struct tm_window *w = &ctx->window;
    if (!w->open) {
        w->open = true;
        w->nheld = w->nwanted = 0;
        w->wrong = 0;
        w->until_ns = 0;
        fetching_begin(ctx->rec, MUTANT(41) ? 0 : ctx->client);
        KP(100);
    }
    if (w->nwanted < TM_FETCH)
        w->wanted[w->nwanted++] = location;
}

void tier_close(struct tm_ctx *ctx)
{
    ctx->window.open = false;
    ctx->window.nwanted = ctx->window.nheld = 0;
    fetching_end(ctx->rec);
}

static struct tm_held *held(struct tm_window *w, uint64_t location)
{
    for (uint32_t i = 0; w->open && i < w->nheld; i++)
        if (w->held[i].location == location)
            return &w->held[i];
    return NULL;
}

const struct tm_block *tier_record(struct tm_ctx *ctx, slot_t *slot, uint64_t word, int *rc)
{
    struct tm_held *h = held(&ctx->window, word & SLOT_VALUE);
    if (h) {
        const struct tm_block *b = (const struct tm_block *)(ctx->window.bytes + h->at);
        uint64_t header = h->length > TM_HEADER ? atomic_load_explicit(&b->word, memory_order_relaxed) : 0;
        uint32_t length = block_length(header), stamp = tier_stamp(ctx->seg, word);
        *rc = TM_OK;
        if (length && length <= TM_PAGE && length <= h->length - TM_HEADER
            && header_slot(header) == slot_number(ctx->seg, slot)
            && atomic_load_explicit(&b->stamp, memory_order_relaxed) == stamp
            && b->checksum == block_checksum(b, header, stamp)) {
            ctx->window.wrong = 0;
            return b;
        }
        h->location = 0;
        *rc = TM_CORRUPT;
        if (++ctx->window.wrong >= TM_WRONG_MOST)
            return NULL;
    }
    tier_want(ctx, word & SLOT_VALUE);
    *rc = TM_AWAY;
    return NULL;
}

int tier_get(struct tm_ctx *ctx, slot_t *slot, uint64_t word, uint8_t *page)
{
    int rc;
    const struct tm_block *b = tier_record(ctx, slot, word, &rc);
    if (!b)
        return rc;
    return block_read(ctx, b, slot_number(ctx->seg, slot), TM_HEADER + TM_PAGE, page) ? TM_OK : TM_CORRUPT;
}

/* After a page of the request was away: what else of it is, while there is room. */
void tier_ahead(struct tm_ctx *ctx, const uint64_t oid[3], uint64_t index, uint64_t n, struct cursor *cur)
{
    for (uint64_t i = index; i < index + n && i <= UINT32_MAX && ctx->window.nwanted < TM_FETCH; i++) {
        cursor_find(ctx->seg, ctx->pool, oid, (uint32_t)i, cur);
        if (!cur->slots)
            return;
        uint64_t word = atomic_load(&cur->slots[i - cur->first]);
        if (slot_type(word) == SLOT_TIER)
            tier_want(ctx, word & SLOT_VALUE);
    }
}

static int fetch(struct tm_ctx *ctx, uint32_t client)
{
    struct tm_segment *seg = ctx->seg;
    KP(101);
    ctx->window.nheld = 0;
    ctx->began_ns = 0; /* what is timed is the store, not a disk */
    int rc = seg->fetch ? seg->fetch(ctx, client) : TM_DOWN;
    ctx->window.nwanted = 0;
    KP(102);
    return rc;
}

int tier_fetch(struct tm_ctx *ctx, uint32_t client)
{
    struct tm_segment *seg = ctx->seg;
    int rc = fetch(ctx, client);
    if (rc != TM_OK) {
        tier_close(ctx);
        atomic_fetch_add_explicit(&seg->super->failed, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&seg->clients[client].unreachable, 1, memory_order_relaxed);
    }
    return rc;
}

int tier_try(struct tm_ctx *ctx, uint32_t client)
{
    int rc = fetch(ctx, client);
    if (rc == TM_OK && !ctx->window.nheld && ctx->window.until_ns)
        rc = TM_DOWN; /* it did not answer, and others would try again */
    if (rc != TM_OK)
        tier_close(ctx);
    return rc;
}

int tier_resume(const struct tm_handle *h, struct tm_ctx **ctx)
{
    op_end(*ctx);
    int rc = tier_fetch(*ctx, h->pool / TM_CLIENT_POOLS);
    /* An operation that could not begin has mostly closed the window as it ended; twice would make the mark odd. */
    if (rc == TM_OK && (rc = enter(h, ctx)) != TM_OK && (*ctx)->window.open)
        tier_close(*ctx);
    return rc;
}

/* ---- The spill file --------------------------------------------------------------------------------------- */

/* A location: bits 0..33 where the record begins, in 64 bytes; 34..35 how many blocks of 4 KiB it touches. */
static uint64_t begin_of(uint64_t location) { return (location & ((UINT64_C(1) << 34) - 1)) * 64; }
static uint64_t block_of(uint64_t location) { return begin_of(location) / TM_PAGE; }
static uint64_t end_of(uint64_t location) { return block_of(location) + (location >> 34); }

static const char SPILL_MAGIC[8] = {'t', 'm', 'e', 'm', 's', 'p', 'l', '\n'};

struct spill_head { /* the first block of the file */
    char magic[8];
    uint32_t version, client, serial, zero;
    uint64_t nonce, size;
};

int spill_open(const char *path, uint64_t nonce, uint32_t client, uint32_t serial, struct tm_spill *out)
{
    _Alignas(4096) uint8_t block[TM_PAGE];
    const struct spill_head *head = (const struct spill_head *)block;
    struct stat st;
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC | O_NOFOLLOW), rc = 0;
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) || pread(fd, block, sizeof block, 0) != (ssize_t)sizeof block)
        rc = errno ? -errno : -EIO;
    else if (!S_ISREG(st.st_mode) || memcmp(head->magic, SPILL_MAGIC, sizeof SPILL_MAGIC) || head->version != 1
             || head->nonce != nonce || head->client != client || head->serial != serial)
        rc = -ESTALE;
    if (rc)
        close(fd);
    else
        *out = (struct tm_spill){fd, (uint64_t)st.st_size};
    return rc;
}

/* Read blocks first..end of the file to `to`; 0, or an error. */
static int read_blocks(const struct tm_spill *spill, uint8_t *to, uint64_t first, uint64_t end)
{
    uint64_t n = (end - first) * TM_PAGE, done = 0;
    while (done < n) {
        ssize_t got = pread(spill->fd, to + done, n - done, (off_t)(first * TM_PAGE + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0 || got % (ssize_t)TM_PAGE)
            return got < 0 ? TM_DOWN : TM_CORRUPT; /* cut off behind our back */
        done += (uint64_t)got;
    }
    return TM_OK;
}

/* One read for each run of wanted records that lie together, the first of them always. */
int spill_fetch(const struct tm_spill *spill, struct tm_window *w)
{
    uint64_t used = 0;
    for (uint32_t i = 0, next; i < w->nwanted; i = next) {
        uint64_t first = block_of(w->wanted[i]), end = end_of(w->wanted[i]), room = (TM_WINDOW - used) / TM_PAGE;
        if (end <= first || end - first > room) /* a damaged slot: no record touches no block */
            break;
        for (next = i + 1; next < w->nwanted; next++) {
            uint64_t begin = block_of(w->wanted[next]), until = end_of(w->wanted[next]);
            if (begin < first || begin > end || until <= begin || until > first + room)
                break;
            end = until > end ? until : end;
        }
        int rc = read_blocks(spill, w->bytes + used, first, end);
        if (rc != TM_OK)
            return i ? TM_OK : rc;
        for (; i < next; i++) {
            uint64_t at = begin_of(w->wanted[i]) - first * TM_PAGE;
            w->held[w->nheld++] = (struct tm_held){w->wanted[i], (uint32_t)(used + at),
                                                   (uint32_t)((end - first) * TM_PAGE - at)};
        }
        used += (end - first) * TM_PAGE;
    }
    return w->nheld ? TM_OK : TM_CORRUPT;
}
