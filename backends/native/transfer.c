/* Pages in and out in the form in which they are stored: for save files and handoffs.
 *
 * An export with `changes` notes in each page's own slot that it has been passed on: CLEAN, which a put turns into
 * STALE and a flush into GONE, until the next pass tells that. So what has changed since is known without a log that
 * could overflow or be lost, and a pass costs eight bytes of reading a page. */
#include "tm.h"

#include <string.h>

enum { KIND_FILL, KIND_RAW, KIND_LZ4, KIND_ABSENT };
enum { HEADER = TM_OID + 8, SLOTS_PER_OPERATION = 4096, RECORDS_PER_OPERATION = 256 };

struct sink {
    uint8_t *at;
    size_t left, all;
};

static void emit(struct sink *to, const uint64_t oid[3], uint32_t index, unsigned kind, const void *data, uint32_t length)
{
    uint16_t n = (uint16_t)length;
    memcpy(to->at, oid, TM_OID);
    memcpy(to->at + TM_OID, &index, 4);
    memcpy(to->at + TM_OID + 4, &n, 2);
    to->at[TM_OID + 6] = (uint8_t)kind;
    to->at[TM_OID + 7] = 0;
    if (length)
        memcpy(to->at + HEADER, data, length);
    to->at += HEADER + length;
    to->left -= HEADER + length;
}

/* The page in ctx->page. */
static void emit_page(struct tm_ctx *ctx, const struct tm_export *e, const uint64_t oid[3], struct sink *to)
{
    uint32_t length = codec_compress(ctx, ctx->page, ctx->scratch);
    if (length < TM_PAGE)
        emit(to, oid, (uint32_t)e->index, KIND_LZ4, ctx->scratch, length);
    else
        emit(to, oid, (uint32_t)e->index, KIND_RAW, ctx->page, TM_PAGE);
}

/* A condensed page leaves as any other: how it is kept is of this segment alone. False: it cannot be expanded. */
static bool emit_condensed(struct tm_ctx *ctx, const struct tm_export *e, const struct tm_block *b, uint64_t number,
                           uint64_t most, const uint64_t oid[3], struct sink *to)
{
    if (!block_read(ctx, b, number, most, ctx->page))
        return false;
    emit_page(ctx, e, oid, to);
    return true;
}

/* Write the record of one page, if there is anything to say about it. */
static int export_slot(struct tm_ctx *ctx, const struct tm_export *e, slot_t *slot, const uint64_t oid[3], struct sink *to)
{
    struct tm_segment *seg = ctx->seg;
    for (;;) {
        uint64_t word = atomic_load_explicit(slot, memory_order_acquire), next = (word & ~SLOT_FREQ) | SLOT_CLEAN;
        struct sink before = *to;
        unsigned type = slot_type(word);
        bool good = true;
        if (type == SLOT_EMPTY) {
            if (!e->changes || (word & SLOT_VALUE) != SLOT_GONE)
                return TM_OK;
            next = word & ~SLOT_VALUE;
            emit(to, oid, (uint32_t)e->index, KIND_ABSENT, NULL, 0);
        } else if (type == SLOT_FILL && !(e->changes && (word & SLOT_FREQ) == SLOT_CLEAN)) {
            codec_expand(word & SLOT_VALUE, ctx->page);
            emit(to, oid, (uint32_t)e->index, KIND_FILL, ctx->page, 8);
        } else if (type == SLOT_BLOCK && !(e->changes && (word & SLOT_FREQ) == SLOT_CLEAN)) {
            uint64_t block = word & SLOT_VALUE;
            const struct tm_block *b = block_at(seg, block);
            uint64_t most = in_data(seg, block * 16) ? seg->size - block * 16 : 0;
            good = most > TM_HEADER;
            uint64_t header = good ? atomic_load_explicit(&b->word, memory_order_acquire) : 0;
            uint32_t length = block_length(header);
            good = good && header_slot(header) == slot_number(seg, slot) && length && length <= TM_PAGE
                   && TM_HEADER + length <= most
                   && b->checksum == block_checksum(b, header, atomic_load(&b->stamp));
            if (good && block_kind(header) == BLOCK_ZSTD)
                good = emit_condensed(ctx, e, b, slot_number(seg, slot), most, oid, to);
            else if (good)
                emit(to, oid, (uint32_t)e->index, block_kind(header) == BLOCK_LZ4 ? KIND_LZ4 : KIND_RAW, b + 1, length);
        } else if ((type == SLOT_TWIN || type == SLOT_PACKED) && !(e->changes && (word & SLOT_FREQ) == SLOT_CLEAN)) {
            int rc = type == SLOT_TWIN ? twin_get(ctx, ctx->pool, word, ctx->page)
                                       : pack_get(ctx, ctx->pool, slot, word, ctx->page);
            if (rc == TM_AWAY) {
                if (!slot_changed(slot, word))
                    return TM_AWAY;
                ctx->window.nwanted = 0;
                continue;
            }
            if (rc == TM_MISS && !seg->pools[ctx->pool].persistent) {
                if (twin_is_gone(ctx, ctx->pool, slot, word))
                    return TM_OK;
                continue;
            }
            if ((good = rc == TM_OK))
                emit_page(ctx, e, oid, to);
        } else if (type == SLOT_TIER && !(e->changes && (word & SLOT_FREQ) == SLOT_CLEAN)) {
            int rc;
            const struct tm_block *b = tier_record(ctx, slot, word, &rc);
            if (rc == TM_AWAY) {
                if (!slot_changed(slot, word))
                    return TM_AWAY;
                ctx->window.nwanted = 0;
                continue;
            }
            good = b != NULL;
            uint64_t header = good ? atomic_load(&b->word) : 0;
            if (good && block_kind(header) == BLOCK_ZSTD)
                good = emit_condensed(ctx, e, b, slot_number(seg, slot), TM_HEADER + TM_PAGE, oid, to);
            else if (good)
                emit(to, oid, (uint32_t)e->index, block_kind(header) == BLOCK_LZ4 ? KIND_LZ4 : KIND_RAW, b + 1,
                     block_length(header));
        } else {
            return TM_OK;
        }
        KP(80);
        atomic_thread_fence(memory_order_acquire);
        uint64_t now = atomic_load_explicit(slot, memory_order_relaxed);
        bool same = !((now ^ word) & ~SLOT_FREQ);
        if (same && !good)
            return TM_CORRUPT;
        /* Only what is marked has been passed on: a change from here on is seen by the next pass. */
        if (same && (!e->changes || atomic_compare_exchange_strong(slot, &word, next)))
            return TM_OK;
        *to = before;
    }
}

/* Go on with the object at `ref` until it or the room ends. */
static int export_object(struct tm_ctx *ctx, struct tm_export *e, uint32_t ref, struct sink *to, unsigned *slots)
{
    const struct tm_object *o = meta_at(ctx->seg, ref);
    struct cursor cur = {0};
    for (; e->index <= UINT32_MAX; e->index++) {
        if (to->left < HEADER + TM_PAGE || *slots >= SLOTS_PER_OPERATION)
            return TM_AGAIN;
        cursor_find(ctx->seg, ctx->pool, o->oid, (uint32_t)e->index, &cur);
        if (!cur.slots) {
            e->index = cur.last;
            continue;
        }
        int rc = export_slot(ctx, e, &cur.slots[e->index - cur.first], o->oid, to);
        ++*slots;
        if (rc == TM_AWAY) {
            tier_ahead(ctx, o->oid, e->index + 1, 64, &cur);
            return rc;
        }
        if (rc == TM_CORRUPT && to->left != to->all)
            return rc; /* first what is there already: the next call meets it again */
        if (rc != TM_OK) {
            e->index++;
            return rc;
        }
    }
    return TM_OK;
}

int64_t tm_export_fill(struct tm_export *e, uint8_t *buffer, size_t size)
{
    struct tm_segment *seg = e->pool.seg;
    struct sink to = {buffer, size, size};
    struct tm_ctx *ctx;
    int rc = TM_OK;
    while (e->chunk < seg->nchunks && to.left >= HEADER + TM_PAGE && rc != TM_CORRUPT) {
        unsigned slots = 0;
        if ((rc = enter_departed(&e->pool, &ctx)) != TM_OK) /* flushes go on until it has departed */
            return rc;
        if (e->changes && !phase_of(seg, ctx->client)) {
            op_end(ctx);
            return TM_WRONG;
        }
        while (e->chunk < seg->nchunks && rc == TM_OK) {
            uint32_t ref = object_at(seg, ctx->pool, e->chunk, e->bit);
            rc = ref ? export_object(ctx, e, ref, &to, &slots) : TM_OK;
            if (rc != TM_OK)
                break; /* TM_AWAY: at the page that has to be fetched */
            e->index = 0;
            bool objects = atomic_load(&seg->states[e->chunk]) == CHUNK_USED && seg->chunks[e->chunk].bin == BIN_OBJECT;
            if (++e->bit == TM_CHUNK / sizeof(struct tm_object) || !objects) {
                e->bit = 0;
                e->chunk++;
            }
        }
        op_end(ctx);
        if (rc == TM_AWAY && (rc = tier_fetch(ctx, e->pool.pool / TM_CLIENT_POOLS)) != TM_OK)
            break;
    }
    return rc < 0 && rc != TM_AGAIN && to.left == size ? rc : (int64_t)(size - to.left);
}

struct record {
    uint64_t oid[3];
    uint32_t index, length;
    unsigned kind;
    const uint8_t *data;
};

/* The record at `p`, of `left` bytes; its whole length, or 0 if it is none. */
static size_t parse(const uint8_t *p, size_t left, struct record *r)
{
    uint16_t n;
    if (left < HEADER)
        return 0;
    memcpy(r->oid, p, TM_OID);
    memcpy(&r->index, p + TM_OID, 4);
    memcpy(&n, p + TM_OID + 4, 2);
    r->length = n;
    r->kind = p[TM_OID + 6];
    r->data = p + HEADER;
    bool fits = r->kind == KIND_FILL ? n == 8 : r->kind == KIND_RAW ? n == TM_PAGE
              : r->kind == KIND_LZ4 ? n > 0 && n <= TM_PAGE - TM_LEAST_GAIN : r->kind == KIND_ABSENT && n == 0;
    return fits && p[TM_OID + 7] == 0 && left >= HEADER + (size_t)n ? HEADER + (size_t)n : 0;
}

static int import_one(struct tm_ctx *ctx, const struct record *r, struct cursor *cur)
{
    struct content what = {.form = r->kind == KIND_RAW ? BLOCK_RAW : BLOCK_LZ4, .length = r->length, .payload = r->data};
    if (r->kind == KIND_ABSENT) {
        *cur = (struct cursor){0};
        cursor_find(ctx->seg, ctx->pool, r->oid, r->index, cur);
        if (cur->slots)
            slot_flush(ctx, ctx->pool, &cur->slots[r->index - cur->first], SLOT_EMPTY);
        *cur = (struct cursor){0};
        return TM_OK;
    }
    int rc = cursor_make(ctx, r->oid, r->index, cur);
    if (rc == TM_REFUSED)
        count(ctx->seg, ctx->pool, C_REFUSED, 1);
    if (rc != TM_OK)
        return rc;
    slot_t *slot = &cur->slots[r->index - cur->first];
    if (r->kind == KIND_FILL) {
        for (uint32_t i = 0; i < TM_PAGE; i += 8)
            memcpy(ctx->page + i, r->data, 8);
        return slot_put(ctx, ctx->pool, slot, ctx->page, KEEP_NOTHING, NULL);
    }
    return slot_store(ctx, ctx->pool, slot, &what, KEEP_NOTHING, NULL);
}

int64_t tm_import(const struct tm_handle *h, const uint8_t *records, size_t size)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    struct record r, last = {.oid = {0}};
    int64_t done = 0;
    int rc = enter(h, &ctx);
    if (rc != TM_OK)
        return rc;
    for (size_t at = 0; rc == TM_OK && at < size; done++) {
        size_t n = parse(records + at, size - at, &r);
        if (!n) {
            rc = TM_MALFORMED;
            break;
        }
        if (memcmp(r.oid, last.oid, TM_OID) != 0)
            cur = (struct cursor){0};
        last = r;
        if (r.kind != KIND_ABSENT && refuses_puts(ctx)) {
            rc = TM_SHUT;
            break;
        }
        for (unsigned tries = 0; (rc = import_one(ctx, &r, &cur)) == TM_AGAIN; tries++) {
            cur = (struct cursor){0};
            if ((rc = again(h, &ctx, tries)) != TM_OK)
                return rc;
        }
        count(h->seg, ctx->pool, C_PUTS, r.kind != KIND_ABSENT);
        at += n;
        if (done % RECORDS_PER_OPERATION == RECORDS_PER_OPERATION - 1) { /* let those go on who wait for us to end */
            cur = (struct cursor){0};
            op_end(ctx);
            if ((rc = enter(h, &ctx)) != TM_OK)
                return rc;
        }
    }
    op_end(ctx);
    return rc == TM_OK ? done : rc;
}
