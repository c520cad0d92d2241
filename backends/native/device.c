/* A block device on one object of a persistent pool. What was never written, or was trimmed, reads as zeros.
 *
 * A request that covers part of a page is read-modify-write. It is made atomic not by a lock but by the page's
 * slot: the new page goes in only if the slot still is as it was when the old page was read, whoever the other
 * writers are: another thread, or another server of the same device. */
#include "tm.h"

#include <string.h>

/* One contiguous piece of one page, 0 < n <= TM_PAGE; `data` NULL writes zeros. */
static int write_part(const struct tm_device *d, uint64_t offset, const uint8_t *data, uint32_t n)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3], seen = 0;
    uint32_t index = (uint32_t)(offset / TM_PAGE), start = (uint32_t)(offset % TM_PAGE);
    int rc = enter(&d->pool, &ctx);
    if (rc != TM_OK)
        return rc;
    memcpy(id, d->oid, TM_OID);
    for (unsigned tries = 0;; tries++) {
        rc = cursor_for_put(ctx, id, index, NULL, KEEP_OR_WAIT, &cur);
        if (rc == TM_OK) {
            slot_t *slot = &cur.slots[index - cur.first];
            rc = slot_get(ctx, d->pool.pool, slot, ctx->page, &seen);
            if (rc == TM_AWAY) {
                cur = (struct cursor){0};
                if ((rc = tier_resume(&d->pool, &ctx)) != TM_OK)
                    return rc;
                continue;
            }
            if (rc == TM_MISS)
                memset(ctx->page, 0, TM_PAGE);
            if (rc != TM_CORRUPT) {
                if (data)
                    memcpy(ctx->page + start, data, n);
                else
                    memset(ctx->page + start, 0, n);
                KP(70);
                rc = slot_put(ctx, d->pool.pool, slot, ctx->page, KEEP_OR_WAIT, &seen);
                count(d->pool.seg, d->pool.pool, C_PUTS, rc != TM_AGAIN && rc != TM_WAIT);
            }
        }
        if (rc != TM_AGAIN)
            break;
        cur = (struct cursor){0};
        if ((rc = again(&d->pool, &ctx, tries)) != TM_OK)
            return rc;
    }
    op_end(ctx);
    return rc;
}

/* Split [offset, offset + n) into a first part, whole pages and a last part. */
struct split {
    uint32_t head, tail; /* bytes */
    uint64_t pages;
};

static struct split split(uint64_t offset, uint64_t n)
{
    struct split s = {0, 0, 0};
    uint32_t into = (uint32_t)(offset % TM_PAGE);
    if (into)
        s.head = n < TM_PAGE - into ? (uint32_t)n : TM_PAGE - into;
    s.pages = (n - s.head) / TM_PAGE;
    s.tail = (uint32_t)((n - s.head) % TM_PAGE);
    return s;
}

static int read_part(const struct tm_device *d, uint8_t *data, uint64_t offset, uint32_t n)
{
    struct tm_ctx *ctx = ctx_get(d->pool.seg);
    if (!ctx)
        return TM_NOTHREAD;
    int64_t rc = tm_get(&d->pool, d->oid, (uint32_t)(offset / TM_PAGE), ctx->page, 1);
    if (rc < 0)
        return (int)rc;
    if (rc)
        memcpy(data, ctx->page + offset % TM_PAGE, n);
    else
        memset(data, 0, n);
    return TM_OK;
}

int dev_read(const struct tm_device *d, uint8_t *data, uint64_t offset, uint64_t n)
{
    struct split s = split(offset, n);
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3], hits = 0;
    int rc = s.head ? read_part(d, data, offset, s.head) : TM_OK;
    if (rc == TM_OK && s.pages) {
        uint32_t index = (uint32_t)((offset + s.head) / TM_PAGE);
        if ((rc = enter(&d->pool, &ctx)) != TM_OK)
            return rc;
        memcpy(id, d->oid, TM_OID);
        for (uint64_t i = 0; i < s.pages && rc == TM_OK; i++) {
            uint8_t *page = data + s.head + i * TM_PAGE;
            cursor_find(d->pool.seg, d->pool.pool, id, index + (uint32_t)i, &cur);
            rc = cur.slots ? slot_get(ctx, d->pool.pool, &cur.slots[index + i - cur.first], page, NULL) : TM_MISS;
            if (rc == TM_AWAY) {
                tier_ahead(ctx, id, (uint64_t)index + i + 1, s.pages - i - 1, &cur);
                cur = (struct cursor){0};
                if ((rc = tier_resume(&d->pool, &ctx)) != TM_OK)
                    return rc;
                i--;
                continue;
            }
            hits += rc == TM_OK;
            if (rc == TM_MISS) {
                memset(page, 0, TM_PAGE);
                rc = TM_OK;
            }
        }
        count(d->pool.seg, d->pool.pool, C_GETS, s.pages);
        count(d->pool.seg, d->pool.pool, C_HITS, hits);
        op_end(ctx);
    }
    if (rc == TM_OK && s.tail)
        rc = read_part(d, data + s.head + s.pages * TM_PAGE, offset + s.head + s.pages * TM_PAGE, s.tail);
    return rc;
}

int dev_write(const struct tm_device *d, const uint8_t *data, uint64_t offset, uint64_t n, uint64_t *done)
{
    struct split s = split(offset, n);
    int rc = s.head ? write_part(d, offset, data, s.head) : TM_OK;
    *done += rc == TM_OK ? s.head : 0;
    if (rc == TM_OK && s.pages) {
        uint32_t pages = (uint32_t)s.pages;
        int64_t stored = tm_put(&d->pool, d->oid, (uint32_t)((offset + s.head) / TM_PAGE), data + s.head, pages,
                                KEEP_OR_WAIT);
        rc = stored < 0 ? (int)stored : stored < (int64_t)pages ? TM_REFUSED : TM_OK;
        *done += stored < 0 ? 0 : (uint64_t)stored * TM_PAGE;
    }
    if (rc == TM_OK && s.tail)
        rc = write_part(d, offset + s.head + s.pages * TM_PAGE, data + s.head + s.pages * TM_PAGE, s.tail);
    *done += rc == TM_OK ? s.tail : 0;
    return rc;
}

int dev_zero(const struct tm_device *d, uint64_t offset, uint64_t n)
{
    struct split s = split(offset, n);
    int rc = s.head ? write_part(d, offset, NULL, s.head) : TM_OK;
    if (rc == TM_OK && s.pages) {
        int64_t found = tm_flush(&d->pool, d->oid, (uint32_t)((offset + s.head) / TM_PAGE), s.pages);
        rc = found < 0 ? (int)found : TM_OK;
    }
    if (rc == TM_OK && s.tail)
        rc = write_part(d, offset + s.head + s.pages * TM_PAGE, NULL, s.tail);
    return rc;
}
