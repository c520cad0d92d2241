/* Operations: put, get and flush of ranges of an object's pages, and flush of an object. What happens at each page's
 * slot is in slot.c. */
#include "tm.h"

#include <sched.h>
#include <string.h>

static bool live(const struct tm_handle *h)
{
    const struct tm_pool *p = &h->seg->pools[h->pool];
    return atomic_load(&h->seg->super->alive) && atomic_load(&p->state) == 1 && atomic_load(&p->serial) == h->serial;
}

int enter_departed(const struct tm_handle *h, struct tm_ctx **ctx)
{
    if (atomic_load_explicit(&h->seg->closed, memory_order_relaxed))
        return TM_NOPOOL;
    if (!(*ctx = ctx_get(h->seg)))
        return TM_NOTHREAD;
    op_begin(*ctx);
    if (live(h)) { /* after op_begin: a destroyer waits for us or we see it */
        uint32_t link = h->seg->pools[h->pool].link;
        (*ctx)->pool = link ? link : h->pool;
        (*ctx)->client = h->pool / TM_CLIENT_POOLS;
        (*ctx)->payer = payer_of(h->seg, (*ctx)->pool);
        return TM_OK;
    }
    op_end(*ctx);
    atomic_fetch_add_explicit(&h->seg->super->failed, 1, memory_order_relaxed);
    return TM_NOPOOL;
}

int enter(const struct tm_handle *h, struct tm_ctx **ctx)
{
    int rc = enter_departed(h, ctx);
    if (rc != TM_OK || phase_of(h->seg, (*ctx)->client) != PHASE_DEPARTED)
        return rc;
    op_end(*ctx); /* what is changed here now would be lost */
    return TM_WAIT;
}

/* Whoever is stopped while it condemns an object (Ctrl-Z) keeps all puts to it waiting, a kernel that swaps among them, as the
 * holder of a lock would (lock.c). */
static void continue_destroyers(struct tm_segment *seg)
{
    uint32_t n = atomic_load(&seg->super->nthreads);
    for (uint32_t i = 0; i < n && !MUTANT(37); i++)
        if (atomic_load(&seg->threads[i].dying))
            continue_if_stopped((int)seg->threads[i].pid);
}

/* After a slot or object turned out to be dying: let its destroyer finish, or finish for it. */
int again(const struct tm_handle *h, struct tm_ctx **ctx, unsigned tries)
{
    op_end(*ctx);
    if (tries % 64 == 63) {
        tm_reap(*ctx);
        continue_destroyers(h->seg);
    }
    sched_yield();
    return enter(h, ctx);
}

static void unpack(const uint8_t *oid, uint64_t out[3]) { memcpy(out, oid, TM_OID); }

/* Count for the pool, and for a membership in a shared one also there: what this client did. */
static void count_both(const struct tm_handle *h, const struct tm_ctx *ctx, unsigned counter, uint64_t n)
{
    count(h->seg, ctx->pool, counter, n);
    if (h->pool != ctx->pool)
        count(h->seg, h->pool, counter, n);
}

/* Of a shared pool's object: who used it last (semantics K2). */
static void used_by(struct tm_ctx *ctx, uint32_t object, uint32_t client)
{
    struct tm_object *o = meta_at(ctx->seg, object);
    if (atomic_load_explicit(&o->user, memory_order_relaxed) != client + 1)
        atomic_store_explicit(&o->user, client + 1, memory_order_relaxed);
}

/* Is the client of `ctx` at its cap, with nothing of its own to evict? */
static bool at_cap(struct tm_ctx *ctx)
{
    return !has_cap_for(ctx->seg, ctx->payer, TM_STRIDE_MIN) && !client_chunks(ctx->seg, ctx->payer);
}

int cursor_make(struct tm_ctx *ctx, const uint64_t oid[3], uint32_t index, struct cursor *cur)
{
    int rc = cursor_create(ctx, ctx->pool, oid, index, cur);
    for (unsigned tries = 0; rc == TM_REFUSED && tries < TM_RESCUES && !MUTANT(67) && twin_rescue(ctx); tries++)
        rc = cursor_create(ctx, ctx->pool, oid, index, cur);
    return rc;
}

int cursor_for_put(struct tm_ctx *ctx, const uint64_t oid[3], uint32_t index, const uint8_t *page, enum keep keep,
                   struct cursor *cur)
{
    uint64_t value;
    bool refused = refuses_puts(ctx), full = !refused && page && at_cap(ctx) && !codec_fill(page, &value);
    for (unsigned tries = 0; full && tries < TM_RESCUES && !MUTANT(69) && twin_rescue(ctx); tries++)
        full = at_cap(ctx);
    if (!refused && !full)
        return cursor_make(ctx, oid, index, cur);
    /* No index is made for a page that will be refused; what is there is still of interest. */
    cursor_find(ctx->seg, ctx->pool, oid, index, cur);
    if (cur->slots)
        return TM_OK;
    cur->valid = false;
    return refused && keep == KEEP_OR_WAIT && phase_of(ctx->seg, ctx->client) >= PHASE_FROZEN ? TM_WAIT : TM_REFUSED;
}

/* There is no leaf for the page, so nothing can be there either. */
static void refused_without_leaf(struct tm_ctx *ctx)
{
    count(ctx->seg, ctx->pool, C_REFUSED, 1);
    if (!refuses_puts(ctx))
        atomic_fetch_add_explicit(&ctx->seg->clients[ctx->payer].no_memory, 1, memory_order_relaxed);
}

int64_t tm_put(const struct tm_handle *h, const uint8_t *oid, uint32_t index, const uint8_t *data, uint32_t n,
               enum keep keep)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3];
    int64_t done = 0;
    int rc = enter(h, &ctx);
    unsigned tries = 0;
    uint64_t attempted = 0;
    if (rc != TM_OK)
        return rc;
    timing_begin(ctx);
    unpack(oid, id);
    for (uint32_t i = 0; i < n; i++) {
        rc = cursor_for_put(ctx, id, index + i, data + (size_t)i * TM_PAGE, keep, &cur);
        if (rc == TM_OK)
            rc = slot_put(ctx, ctx->pool, &cur.slots[index + i - cur.first], data + (size_t)i * TM_PAGE, keep, NULL);
        else if (rc == TM_REFUSED)
            refused_without_leaf(ctx);
        if (rc == TM_AGAIN) {
            cur = (struct cursor){0};
            if ((rc = again(h, &ctx, tries++)) != TM_OK) {
                count_both(h, ctx, C_PUTS, attempted);
                return rc;
            }
            i--;
            continue;
        }
        if (rc == TM_WAIT)
            break;
        attempted++;
        if (rc == TM_OK) {
            done++;
            if (ctx->pool != h->pool)
                used_by(ctx, cur.object, payer_of(h->seg, ctx->pool));
        } else if (keep) {
            break;
        }
    }
    count_both(h, ctx, C_PUTS, attempted);
    if (ctx->pool != h->pool)
        count(h->seg, h->pool, C_STORED, (uint64_t)done);
    if (done < (int64_t)attempted) /* perhaps objects were made for them in vain */
        look_for_empty(h->seg);
    timing_end(ctx, done == (int64_t)attempted ? T_STORED : T_REFUSED, attempted);
    op_end(ctx);
    return rc == TM_WAIT ? TM_WAIT : done;
}

/* What the block has that is read after the page at `index`, as far as the leaf tells; NULL: there is none. */
static const uint8_t *payload_after(struct tm_segment *seg, const struct cursor *cur, uint32_t index)
{
    if (!cur->slots || index >= cur->last)
        return NULL;
    uint64_t word = atomic_load_explicit(&cur->slots[index + 1 - cur->first], memory_order_relaxed);
    uint64_t block = word & SLOT_VALUE;
    return slot_type(word) == SLOT_BLOCK && in_data(seg, block * 16) ? (const uint8_t *)(block_at(seg, block) + 1) : NULL;
}

int64_t tm_get(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint8_t *data, uint32_t n)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3];
    int64_t done = 0;
    int rc = enter(h, &ctx);
    if (rc != TM_OK)
        return rc;
    timing_begin(ctx);
    unpack(oid, id);
    bool off = !h->seg->pools[ctx->pool].persistent && mode_of(h->seg, ctx->client) == MODE_OFF;
    for (uint32_t i = 0; i < n; i++) {
        cursor_find(h->seg, ctx->pool, id, index + i, &cur);
        ctx->next_payload = i + 1 < n ? payload_after(h->seg, &cur, index + i) : NULL;
        rc = cur.slots && !off
                 ? slot_get(ctx, ctx->pool, &cur.slots[index + i - cur.first], data + (size_t)i * TM_PAGE, NULL)
                 : TM_MISS;
        ctx->next_payload = NULL;
        if (rc == TM_AWAY) {
            tier_ahead(ctx, id, (uint64_t)index + i + 1, n - i - 1, &cur);
            cur = (struct cursor){0};
            if ((rc = tier_resume(h, &ctx)) != TM_OK) {
                count_both(h, ctx, C_GETS, (uint64_t)done + 1);
                count_both(h, ctx, C_HITS, (uint64_t)done);
                return done ? done : rc;
            }
            i--;
            continue;
        }
        if (rc != TM_OK)
            break;
        done++;
    }
    if (done && ctx->pool != h->pool)
        used_by(ctx, cur.object, ctx->client);
    count_both(h, ctx, C_GETS, (uint64_t)done + (rc != TM_OK));
    count_both(h, ctx, C_HITS, (uint64_t)done);
    timing_end(ctx, rc == TM_OK ? T_HIT : T_MISSED, (uint64_t)done + (rc != TM_OK));
    op_end(ctx);
    if (rc == TM_CORRUPT)
        atomic_fetch_add_explicit(&h->seg->super->failed, 1, memory_order_relaxed);
    return rc == TM_CORRUPT && !done ? TM_CORRUPT : done;
}

int64_t tm_flush(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint64_t n)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3], found = 0, end = (uint64_t)index + n;
    int rc = enter(h, &ctx);
    if (rc != TM_OK)
        return rc;
    timing_begin(ctx);
    unpack(oid, id);
    for (uint64_t i = index; i < end; i++) {
        cursor_find(h->seg, ctx->pool, id, (uint32_t)i, &cur);
        if (cur.slots)
            found += (uint64_t)slot_flush(ctx, ctx->pool, &cur.slots[i - cur.first], SLOT_EMPTY);
        else
            i = cur.last;
    }
    count_both(h, ctx, C_FLUSHES, n);
    if (ctx->pool != h->pool)
        count(h->seg, h->pool, C_FLUSHED, found);
    if (found)
        look_for_empty(h->seg);
    timing_end(ctx, T_FLUSH, n);
    op_end(ctx);
    return (int64_t)found;
}

int64_t tm_flush_object(const struct tm_handle *h, const uint8_t *oid)
{
    struct tm_ctx *ctx;
    uint64_t id[3];
    int64_t found = 0;
    int rc = enter(h, &ctx);
    if (rc != TM_OK)
        return rc;
    timing_begin(ctx);
    unpack(oid, id);
    uint32_t ref = object_find(h->seg, ctx->pool, id);
    if (ref) {
        found = object_flush(ctx, meta_at(h->seg, ref));
        atomic_fetch_add(&h->seg->super->emptied, 1);
    }
    count_both(h, ctx, C_OBJECT_FLUSHES, 1);
    count_both(h, ctx, C_OBJECTS_FLUSHED, found > 0);
    if (ctx->pool != h->pool)
        count(h->seg, h->pool, C_FLUSHED, (uint64_t)found);
    timing_end(ctx, T_FLUSH_OBJECT, 1);
    op_end(ctx);
    /* Mostly the manager does this; without one, or when files go faster than it looks, memory comes back here. */
    if (atomic_load(&h->seg->super->emptied) >= 1024 && atomic_exchange(&h->seg->super->emptied, 0))
        object_reap_empty(ctx, 1024);
    return found;
}

int64_t tm_runs(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint64_t n,
                bool (*run)(void *arg, uint64_t first, uint64_t n, bool stored), void *arg)
{
    struct tm_ctx *ctx;
    struct cursor cur = {0};
    uint64_t id[3], end = (uint64_t)index + n, start = index;
    bool is = false, more = true;
    int rc = enter(h, &ctx);
    if (rc != TM_OK)
        return rc;
    unpack(oid, id);
    for (uint64_t i = index; i < end && more;) {
        cursor_find(h->seg, ctx->pool, id, (uint32_t)i, &cur);
        bool now = cur.slots && slot_stored(atomic_load_explicit(&cur.slots[i - cur.first], memory_order_relaxed));
        if (now != is && i > start) {
            more = run(arg, start, i - start, is);
            start = i;
        }
        is = now;
        i = cur.slots ? i + 1 : (uint64_t)cur.last + 1;
    }
    op_end(ctx);
    if (more && end > start)
        run(arg, start, end - start, is);
    return TM_OK;
}
