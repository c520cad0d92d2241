/* From a handle to its slot: hash chain of objects, then leaves of slots.
 *
 *   index      0..15   16..63  64..511  512..4095 (by 512)   4096 and up
 *   leaf of       16       64      512       512                 512 slots
 *   found by    tiny    small   leaf[0]   leaf[1..7]          root[] -> node -> node -> leaf
 *
 * so that a small file costs 256 bytes of index and a swap device is found in three hops. Look-up takes no lock:
 * everything in the way is freed only after a grace period. Growth is under the object's shard lock and commits
 * with one store. A leaf whose object is being destroyed has DEAD slots; who meets one looks up again. */
#include "tm.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <string.h>

uint64_t object_hash(uint32_t pool, const uint64_t oid[3]) { return XXH3_64bits_withSeed(oid, TM_OID, pool); }

static _Atomic uint32_t *bucket_of(struct tm_segment *seg, uint64_t hash)
{
    return &seg->buckets[hash & (seg->super->nbuckets - 1)];
}

struct tm_lock *shard_of(struct tm_segment *seg, uint64_t hash)
{
    return &seg->super->shards[(hash & (seg->super->nbuckets - 1)) % TM_NSHARDS];
}

static uint32_t find_in(struct tm_segment *seg, const _Atomic uint32_t *bucket, uint32_t pool, const uint64_t oid[3])
{
    uint32_t ref = atomic_load_explicit(bucket, memory_order_acquire);
    while (ref) {
        struct tm_object *o = meta_at(seg, ref);
        if (o->pool == pool && o->oid[0] == oid[0] && o->oid[1] == oid[1] && o->oid[2] == oid[2])
            break;
        ref = atomic_load_explicit(&o->next, memory_order_acquire);
    }
    return ref;
}

uint32_t object_find(struct tm_segment *seg, uint32_t pool, const uint64_t oid[3])
{
    return find_in(seg, bucket_of(seg, object_hash(pool, oid)), pool, oid);
}

static void one_more(struct tm_ctx *ctx, _Atomic int64_t *now, _Atomic int64_t *most)
{
    int64_t n = atomic_fetch_add(now, 1) + 1;
    note_change(ctx);
    if (n > atomic_load_explicit(most, memory_order_relaxed))
        atomic_store_explicit(most, n, memory_order_relaxed);
}

/* Link the unit of intent meta_new at `parent`, or free it if somebody was quicker or the object dies. */
static int link_unit(struct tm_ctx *ctx, struct tm_object *o, _Atomic uint32_t *parent)
{
    struct tm_thread *rec = ctx->rec;
    struct tm_lock *shard = shard_of(ctx->seg, object_hash(o->pool, o->oid));
    int rc = TM_OK;
    lock_take(shard); /* every change under it is one store: nothing to repair */
    if (atomic_load(&o->state) != 1)
        rc = TM_AGAIN;
    else if (atomic_load(parent))
        rc = TM_MISS;
    if (rc == TM_OK) {
        atomic_store(&rec->meta_parent, off(ctx->seg, parent));
        KP(20);
        atomic_store_explicit(parent, atomic_load(&rec->meta_new), memory_order_release);
        KP(21);
        atomic_store(&rec->meta_new, 0);
        one_more(ctx, &ctx->seg->pools[o->pool].nodes, &ctx->seg->pools[o->pool].nodes_most);
    }
    lock_drop(shard);
    if (rc != TM_OK)
        meta_free_new(ctx);
    return rc == TM_MISS ? TM_OK : rc;
}

/* Make the unit below `parent` if there is none. */
static int grow(struct tm_ctx *ctx, struct tm_object *o, _Atomic uint32_t *parent, uint32_t bin)
{
    if (atomic_load_explicit(parent, memory_order_acquire))
        return TM_OK;
    uint32_t ref = meta_alloc(ctx, bin);
    if (!ref)
        return TM_REFUSED;
    memset(meta_at(ctx->seg, ref), 0, bin_stride(bin));
    return link_unit(ctx, o, parent);
}

static int object_create(struct tm_ctx *ctx, uint32_t pool, const uint64_t oid[3], uint32_t *out)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t hash = object_hash(pool, oid);
    _Atomic uint32_t *bucket = bucket_of(seg, hash);
    uint32_t ref = meta_alloc(ctx, BIN_OBJECT);
    if (!ref)
        return TM_REFUSED;
    struct tm_object *o = meta_at(seg, ref);
    memset(o, 0, sizeof *o);
    memcpy(o->oid, oid, TM_OID);
    o->pool = pool;
    atomic_store(&o->state, 1);
    lock_take(shard_of(seg, hash));
    uint32_t other = find_in(seg, bucket, pool, oid);
    if (!other) {
        atomic_store(&o->next, atomic_load(bucket));
        atomic_store(&ctx->rec->meta_parent, off(seg, bucket) + 1);
        KP(22);
        atomic_store_explicit(bucket, ref, memory_order_release);
        KP(23);
        atomic_store(&ctx->rec->meta_new, 0);
        one_more(ctx, &seg->pools[pool].objects, &seg->pools[pool].objects_most);
    }
    lock_drop(shard_of(seg, hash));
    if (other)
        meta_free_new(ctx);
    *out = other ? other : ref;
    return TM_OK;
}

/* The way from an object to the leaf of an index: the words to follow and what hangs on each. */
struct path {
    uint32_t first, last; /* indexes of the leaf */
    unsigned kind;
    unsigned nodes;       /* nodes above the leaf */
    _Atomic uint32_t *top;
};

static struct path path_of(struct tm_object *o, uint32_t index)
{
    if (index < 16)
        return (struct path){0, 15, UNIT_TINY, 0, &o->tiny};
    if (index < 64)
        return (struct path){16, 63, UNIT_SMALL, 0, &o->small};
    if (index < 512)
        return (struct path){64, 511, UNIT_FULL, 0, &o->leaf[0]};
    uint32_t leaf = index >> 9;
    if (leaf < 8)
        return (struct path){leaf << 9, leaf << 9 | 511, UNIT_FULL, 0, &o->leaf[leaf]};
    return (struct path){leaf << 9, leaf << 9 | 511, UNIT_FULL, 2, &o->root[leaf >> 20]};
}

/* The word below node `ref` on the way to `leaf`, at `level` 2 (upper node) or 1. */
static _Atomic uint32_t *entry(struct tm_segment *seg, uint32_t ref, uint32_t leaf, unsigned level)
{
    return (_Atomic uint32_t *)meta_at(seg, ref) + ((level == 2 ? leaf >> 10 : leaf) & 1023);
}

static void cover(struct tm_segment *seg, struct cursor *cur, const struct path *p, uint32_t ref)
{
    cur->first = p->first;
    cur->last = p->last;
    /* Slots of a leaf stand at the index within its 512: the first of the small leaf's are unused. */
    cur->slots = (slot_t *)meta_at(seg, ref) + (p->first & 511);
    cur->valid = true;
}

void cursor_find(struct tm_segment *seg, uint32_t pool, const uint64_t oid[3], uint32_t index, struct cursor *cur)
{
    if (cur->valid && index >= cur->first && index <= cur->last)
        return;
    cur->valid = true;
    cur->slots = NULL;
    if (!cur->object && !(cur->object = object_find(seg, pool, oid))) {
        cur->first = 0;
        cur->last = UINT32_MAX;
        return;
    }
    struct path p = path_of(meta_at(seg, cur->object), index);
    uint32_t ref = atomic_load_explicit(p.top, memory_order_acquire);
    unsigned level = p.nodes;
    for (; level && ref; level--)
        ref = atomic_load_explicit(entry(seg, ref, index >> 9, level), memory_order_acquire);
    if (!ref && p.nodes && level) { /* nothing below a missing node: 2^29 or 2^19 indexes at once */
        uint32_t span = (UINT32_C(1) << (level == 2 ? 29 : 19)) - 1;
        p.last = index | span;
        p.first = index & ~span ? index & ~span : 4096;
    }
    if (ref) {
        cover(seg, cur, &p, ref);
        return;
    }
    cur->first = p.first;
    cur->last = p.last;
}

int cursor_create(struct tm_ctx *ctx, uint32_t pool, const uint64_t oid[3], uint32_t index, struct cursor *cur)
{
    struct tm_segment *seg = ctx->seg;
    if (cur->valid && cur->slots && index >= cur->first && index <= cur->last)
        return TM_OK;
    int rc = TM_OK;
    if (!cur->object && !(cur->object = object_find(seg, pool, oid)))
        rc = object_create(ctx, pool, oid, &cur->object);
    if (rc != TM_OK)
        return rc;
    struct tm_object *o = meta_at(seg, cur->object);
    struct path p = path_of(o, index);
    _Atomic uint32_t *parent = p.top;
    for (unsigned level = p.nodes; rc == TM_OK && level; level--) {
        rc = grow(ctx, o, parent, BIN_NODE);
        if (rc == TM_OK)
            parent = entry(seg, atomic_load(parent), index >> 9, level);
    }
    if (rc == TM_OK)
        rc = grow(ctx, o, parent, BIN_LEAF + pool * 3 + p.kind);
    if (rc == TM_OK)
        cover(seg, cur, &p, atomic_load_explicit(parent, memory_order_acquire));
    else
        *cur = (struct cursor){0};
    return rc;
}

int slot_pool(struct tm_segment *seg, uint64_t number)
{
    uint64_t offset = number * 8;
    if (!in_data(seg, offset))
        return -1;
    uint32_t c = chunk_of(seg, offset), bin = seg->chunks[c].bin;
    if (atomic_load(&seg->states[c]) != CHUNK_USED || bin < BIN_LEAF)
        return -1;
    return (int)((bin - BIN_LEAF) / 3);
}

int leaf_pool(struct tm_segment *seg, uint64_t number)
{
    int pool = slot_pool(seg, number);
    if (pool < 0)
        return -1;
    uint32_t c = chunk_of(seg, number * 8), bin = seg->chunks[c].bin;
    uint64_t within = number * 8 - seg->data_offset - (uint64_t)c * TM_CHUNK;
    return bin >= BIN_LEAF && bit_is_set(&seg->chunks[c], (uint32_t)within / bin_stride(bin)) ? pool : -1;
}
