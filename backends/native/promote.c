/* Promotion: pages that come back from a tier into memory, in two ways.
 *
 * All of them, because the tier is taken away (tm_promote): as puts would, with what evictions that takes, and what
 * cannot be read is waited for and is an error. Or some, because there is memory in plenty (tm_prefetch): nothing is evicted,
 * moved or promised to others for them, and whatever is in the way ends it, for nobody waits: too little that is free, a tier
 * that does not answer. A record that is wrong stays where it is, for who asks for the page to find.
 *
 * The step is the same: the record is fetched into the window as by a get, in no operation; then an operation looks at the
 * slot again and does what a put of the page would, if it still names the location. So the page is in the tier until the
 * swap and in memory from then on, and a put or flush that comes between wins. */
#include "tm.h"

/* Want the records of the next pages of this leaf as well. */
static void want_ahead(struct tm_ctx *ctx, const slot_t *slot, const slot_t *end)
{
    for (slot++; slot < end; slot++) {
        uint64_t word = atomic_load(slot);
        if (slot_type(word) == SLOT_TIER)
            tier_want(ctx, word & SLOT_VALUE);
    }
}

/* The record that was fetched goes to a block, if the slot still is as it was. TM_MISS: it is not in a tier. */
static int promote_one(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, const slot_t *end, enum keep keep)
{
    uint64_t word = atomic_load(slot);
    int rc;
    if (slot_type(word) != SLOT_TIER)
        return TM_MISS;
    const struct tm_block *b = tier_record(ctx, slot, word, &rc);
    if (rc == TM_AWAY) {
        if (slot_changed(slot, word)) {
            ctx->window.nwanted = 0;
            return TM_AGAIN;
        }
        want_ahead(ctx, slot, end);
        return TM_AWAY;
    }
    if (!b)
        return TM_CORRUPT;
    uint64_t header = atomic_load(&b->word);
    struct content what = {.form = block_form(header), .length = block_length(header), .payload = (const uint8_t *)(b + 1)};
    rc = slot_store(ctx, pool, slot, &what, keep, &word);
    if (rc == TM_OK) { /* nobody put anything */
        count(ctx->seg, pool, keep == KEEP_OLD ? C_FETCHED : C_PREFETCHED, 1);
        count(ctx->seg, pool, C_STORED, UINT64_MAX);
        count(ctx->seg, pool, C_REPLACED, UINT64_MAX);
    } else if (rc == TM_REFUSED && keep == KEEP_OLD) {
        count(ctx->seg, pool, C_REFUSED, UINT64_MAX);
    }
    return rc;
}

int64_t tm_promote(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t *hand, uint32_t most)
{
    struct tm_segment *seg = ctx->seg;
    int64_t done = 0;
    uint64_t at_slot = *hand * 8 < seg->data_offset ? seg->data_offset / 8 : *hand;
    int rc = TM_OK;
    while (at_slot * 8 < seg->size && done < most && rc != TM_REFUSED) {
        struct leaf leaf;
        op_begin(ctx);
        if (!client_lives(seg, id, serial)) {
            op_end(ctx);
            return TM_NOPOOL;
        }
        rc = TM_OK;
        if (leaf_at(seg, id, &at_slot, &leaf)) {
            ctx->client = ctx->payer = id;
            ctx->pool = leaf.pool;
            while (at_slot < leaf.end && done < most) {
                rc = promote_one(ctx, leaf.pool, at(seg, at_slot * 8), at(seg, leaf.end * 8), KEEP_OLD);
                if (rc == TM_AGAIN)
                    continue;
                if (rc == TM_AWAY || rc == TM_REFUSED || rc == TM_CORRUPT)
                    break;
                done += rc == TM_OK;
                at_slot++;
            }
        }
        op_end(ctx);
        if (rc == TM_AWAY)
            rc = tier_fetch(ctx, id);
        if (rc == TM_CORRUPT || rc == TM_DOWN)
            return done ? done : rc;
    }
    *hand = at_slot * 8 < seg->size ? at_slot : 0;
    return rc == TM_REFUSED && !done ? TM_REFUSED : done;
}

/* ---- While there is plenty ----------------------------------------------------------------------------------- */

enum { NEAR = 64 }; /* slots: 256 KiB of a device, what some reads ahead of the kernel take */

struct prefetch { /* one call */
    uint64_t at, until; /* the slot to look at, and the end of its group: that many are taken or left together */
    uint32_t most, done;
    unsigned keep;
    bool near;
};

/* May a page come back? Of the limit, beyond what was promised, and of the client's cap `keep` sixteenths stay free. */
static bool has_plenty(struct tm_segment *seg, uint32_t client, unsigned keep)
{
    uint64_t cap = atomic_load_explicit(&seg->clients[client].cap_bytes, memory_order_relaxed);
    uint32_t limit = chunk_limit(seg, false);
    if (MUTANT(33))
        return true;
    return chunks_available(seg, limit) > (uint64_t)limit * keep / 16 + promised_chunks(seg, client)
           && (!cap || has_cap_for(seg, client, (int64_t)(cap / 16 * keep) + TM_STRIDE_RAW));
}

/* Was a page of these slots read from the tier, and not put since? */
static bool read_lately(struct tm_segment *seg, uint64_t from, uint64_t until)
{
    for (; from < until; from++) {
        uint64_t word = atomic_load_explicit((slot_t *)at(seg, from * 8), memory_order_relaxed);
        if (slot_type(word) == SLOT_TIER && (word & SLOT_FREQ))
            return true;
    }
    return false;
}

/* Take pages of this leaf. TM_OK: what was to be taken was; else why not. */
static int take_leaf(struct tm_ctx *ctx, const struct leaf *leaf, struct prefetch *p)
{
    struct tm_segment *seg = ctx->seg;
    for (; p->at < leaf->end; p->at++) {
        if (p->at >= p->until) {
            if (p->done >= p->most)
                return TM_OK;
            p->until = p->at / NEAR * NEAR + NEAR < leaf->end ? p->at / NEAR * NEAR + NEAR : leaf->end;
            if (p->near && !read_lately(seg, p->at, p->until)) {
                p->at = p->until - 1;
                continue;
            }
        }
        slot_t *slot = at(seg, p->at * 8);
        int rc = TM_MISS;
        if (slot_type(atomic_load_explicit(slot, memory_order_relaxed)) != SLOT_TIER)
            continue;
        if (!has_plenty(seg, ctx->payer, p->keep))
            return TM_REFUSED;
        do
            rc = promote_one(ctx, leaf->pool, slot, at(seg, p->until * 8), KEEP_IF_SPARE);
        while (rc == TM_AGAIN);
        if (rc == TM_AWAY || rc == TM_REFUSED)
            return rc;
        if (rc == TM_CORRUPT)
            ctx->window.wrong = 0; /* of the next one */
        p->done += rc == TM_OK;
    }
    return TM_OK;
}

int64_t tm_prefetch(struct tm_ctx *ctx, uint32_t id, uint32_t serial, bool near, unsigned keep, uint64_t *hand,
                    uint32_t most, int *why)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t first = *hand * 8 < seg->data_offset ? seg->data_offset / 8 : *hand;
    struct prefetch p = {.at = first, .most = most, .keep = keep, .near = near};
    for (*why = TM_OK; p.at * 8 < seg->size && (p.done < most || p.at < p.until) && *why == TM_OK;) {
        struct leaf leaf;
        op_begin(ctx); /* one for each leaf, and for each read */
        if (!client_lives(seg, id, serial)) {
            op_end(ctx);
            return TM_NOPOOL;
        }
        if (!notes_use(seg, id)) { /* it is handed over, when bits of slots mean other things, or has no tier any more */
            op_end(ctx);
            break;
        }
        if (leaf_at(seg, id, &p.at, &leaf)) {
            ctx->client = ctx->payer = id;
            ctx->pool = leaf.pool;
            *why = take_leaf(ctx, &leaf, &p);
        }
        if (*why != TM_AWAY)
            ctx->window.nwanted = 0;
        op_end(ctx);
        if (*why == TM_AWAY && (*why = tier_try(ctx, id)) == TM_CORRUPT)
            p.at++; /* it cannot be read at all: it is not to be in the way the next time */
    }
    *hand = p.at * 8 < seg->size ? p.at : 0;
    return p.done;
}
