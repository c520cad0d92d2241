/* Segment: what it holds and has done. */
#include "py.h"

/* Sums over all chunks: O(chunks), 16 per MiB of the segment. */
struct usage {
    int64_t blocks, meta, ephemeral;
};

static struct usage usage_of(struct tm_segment *seg)
{
    struct usage u = {0};
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        if (atomic_load_explicit(&seg->states[c], memory_order_relaxed) != CHUNK_USED)
            continue;
        uint32_t bin = seg->chunks[c].bin;
        u.blocks += bin_is_block(bin);
        u.meta += !bin_is_block(bin);
        u.ephemeral += bin_is_ephemeral(bin);
    }
    return u;
}

PyObject *segment_statistics(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    int64_t persistent = 0, ephemeral = 0, fill = 0, tier = 0, compressed = 0, objects = 0, nodes = 0, fresh = 0;
    int64_t twin = 0, originals = 0, packed = 0, packs = 0, pack_bytes = 0;
    uint64_t evicted, operations;
    const int64_t raw = TM_STRIDE_RAW;
    (void)unused;
    if (!seg)
        return NULL;
    struct tm_super *super = seg->super;
    most_update(seg);
    evicted = atomic_load(&super->retired_evictions);
    operations = atomic_load(&super->retired_operations);
    fresh = (int64_t)atomic_load(&super->retired_new);
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        struct tm_pool *pool = &seg->pools[p];
        if (!atomic_load(&pool->state) || pool->link)
            continue;
        if (is_packs(p)) { /* the same */
            packs += pool->pages;
            pack_bytes += pool->bytes;
            continue;
        }
        if (is_originals(p)) { /* nobody has put those */
            originals += pool->pages;
            tier += pool->tier_pages;
            continue;
        }
        twin += pool->twin_pages;
        packed += pool->packed_pages;
        *(pool->persistent ? &persistent : &ephemeral) += pool->pages;
        tier += pool->tier_pages;
        fill += pool->fill_pages;
        compressed += pool->bytes - pool->raw_pages * raw;
        objects += pool->objects;
        nodes += pool->nodes;
        evicted += pool->counters[C_EVICTIONS];
        operations += pool->counters[C_PUTS] + pool->counters[C_GETS] + pool->counters[C_FLUSHES]
                      + pool->counters[C_OBJECT_FLUSHES];
        if (!pool->persistent)
            fresh += (int64_t)(pool->counters[C_STORED] - pool->counters[C_REPLACED]);
    }
    struct usage u = usage_of(seg);
    int64_t nused = super->nused, nret = super->nret;
    const struct { const char *name; int64_t value; } all[] = {
        {"layout_version", TM_VERSION},
        {"memory_bytes", (int64_t)super->memory_bytes},
        {"used_bytes", nused * TM_CHUNK + (int64_t)seg->data_offset},
        {"limit_bytes", (int64_t)limit_bytes(seg, chunk_limit(seg, false))},
        {"persistent_limit_bytes", (int64_t)limit_bytes(seg, chunk_limit(seg, true))},
        {"size_least_bytes", (int64_t)limit_bytes(seg, atomic_load(&super->size_least))},
        {"size_most_bytes", (int64_t)limit_bytes(seg, atomic_load(&super->size_most))},
        {"reserve_bytes", nret * TM_CHUNK},
        {"hole_bytes", hole_bytes(seg)},
        {"metadata_bytes", u.meta * TM_CHUNK + (int64_t)seg->data_offset},
        {"persistent_pages", persistent},
        {"ephemeral_pages", ephemeral},
        {"fill_pages", fill},
        {"tier_pages", tier},
        {"twin_pages", twin},
        {"original_pages", originals},
        {"packed_pages", packed},
        {"packs", packs},
        {"pack_bytes", pack_bytes},
        {"pages_max", (int64_t)super->most[MOST_PAGES]},
        {"ephemeral_pages_max", (int64_t)super->most[MOST_EPHEMERAL]},
        {"compressed_bytes", compressed},
        {"objects", objects},
        {"objects_max", (int64_t)super->most[MOST_OBJECTS]},
        {"nodes", nodes},
        {"nodes_max", (int64_t)super->most[MOST_NODES]},
        {"operations", (int64_t)operations},
        {"failed_operations", (int64_t)super->failed},
        {"ephemeral_puts_new", fresh},
        {"allocation_failures", (int64_t)super->no_memory},
        {"evicted_pages", (int64_t)evicted},
        {"eviction_attempts", (int64_t)super->drains},
        {"evictions_per_request_max", (int64_t)super->drains_most},
        {"trims", (int64_t)super->trims},
        {"trimmed_bytes", (int64_t)super->trimmed_bytes},
        {"relocated_pages", (int64_t)super->relocated},
        {"compacted_bytes", (int64_t)super->compacted * TM_CHUNK},
        {"compacting_ns", (int64_t)super->compacting_ns},
        {"shrinks", (int64_t)super->shrinks},
        {"squeezed_pages", (int64_t)super->squeezed},
        {"squeezed_bytes", (int64_t)super->squeezed_bytes},
        {"squeezing_ns", (int64_t)super->squeezing_ns},
        {"condensed_pages", (int64_t)super->condensed},
        {"condensed_bytes", (int64_t)super->condensed_bytes},
        {"restored_pages", (int64_t)super->restored},
        {"restored_bytes", (int64_t)super->restored_bytes},
        {"condensing_ns", (int64_t)super->condensing_ns},
        {"pages_packed", (int64_t)super->packed},
        {"pages_packed_bytes", (int64_t)super->packed_bytes},
        {"pages_unpacked", (int64_t)super->unpacked},
        {"packing_ns", (int64_t)super->packing_ns},
        {"dedup_pages", (int64_t)super->twins},
        {"dedup_bytes", (int64_t)super->twin_bytes},
        {"dedup_ns", (int64_t)super->twin_ns},
        {"chunks_total", seg->nchunks},
        {"chunks_used", nused},
        {"chunks_used_max", (int64_t)super->most[MOST_CHUNKS]},
        {"chunks_free", (int64_t)seg->nchunks - nused},
        {"dead_threads_repaired", (int64_t)super->deaths},
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof all / sizeof *all; i++)
        if (set_number(dict, all[i].name, all[i].value))
            Py_CLEAR(dict);
    return dict;
}

PyObject *segment_freeable(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    if (!seg)
        return NULL;
    int64_t free = (int64_t)chunk_limit(seg, true) - seg->super->nused;
    return PyLong_FromLongLong(((free > 0 ? free : 0) + usage_of(seg).ephemeral) * TM_CHUNK);
}
