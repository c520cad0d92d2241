/* tmem's native core: the shared segment and the store in it. docs/concurrency.md is the long form of this.
 *
 * The segment is a file on tmpfs that every serving process maps. It begins with fixed tables (superblock,
 * clients, pools, thread records, bins, object buckets, chunk states, chunk descriptors) and ends in CHUNKS of
 * 64 KiB, which hold everything that grows: compressed pages ("blocks"), objects, and the leaves of the index.
 *
 *   handle (pool, oid, index) -> object (hash chain) -> leaf -> SLOT -> block
 *
 * The slot, one aligned 64-bit word, is the only truth about a page: it is replaced by compare-and-swap and
 * carries a generation. Whoever's compare-and-swap removes a block's reference frees the block. Bitmaps say which
 * blocks are allocated; lists, counts and queues are derived and rebuilt when a lock's holder died. What a thread
 * is about to link or free stands in its thread record ("intents"), so that its death is repaired at once.
 *
 * References are offsets from the start of the file: blocks in units of 16 bytes, index nodes ("meta") in units
 * of 128 bytes, slots in units of 8; 0 is none (the superblock is there).
 *
 * Lock order: object shard, then one of {bin, chunks}; the control lock is outermost. No lock is held during
 * compression, copying, page faults or system calls other than futex.
 */
#ifndef TM_H
#define TM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TM_VERSION 8u
#define TM_PAGE 4096u
#define TM_OID 24u
#define TM_CHUNK 65536u
#define TM_NCLASSES 64u /* sizes of blocks, see tm_strides */
#define TM_STRIDE_MIN 128u
#define TM_STRIDE_RAW 4160u /* the last class: that of pages as they are, which are told by it */
#define TM_LEAST_GAIN 64u   /* bytes that compression must save of a page, or it does not pay */

/* Histograms of timings: bucket i counts what took at most 2^(TM_BUCKET_FIRST + i) ns and more than the one before,
 * the last one all that took longer: 128 ns to 1 s. */
#define TM_BUCKET_FIRST 7u
#define TM_BUCKETS 25u

#define TM_MAX_CLIENTS 64u
#define TM_USER_POOLS 16u   /* that a client may have */
#define TM_CLIENT_POOLS 19u /* and the core's own, behind them: originals of its persistent and ephemeral twins (twin.c), packs (pack.c) */
#define TM_MAX_SHARED 16u
/* Shared pools are numbered behind the clients' own; a member's own pool only links to one. Who pays for memory is
 * an account: a client, or a shared pool, whose account is its owner's for as long as that owns it. */
#define TM_FIRST_SHARED (TM_MAX_CLIENTS * TM_CLIENT_POOLS)
#define TM_FIRST_SHARED_ORIGINALS (TM_FIRST_SHARED + TM_MAX_SHARED) /* of each shared pool, in the same order */
#define TM_MAX_POOLS (TM_FIRST_SHARED_ORIGINALS + TM_MAX_SHARED)
#define TM_NACCOUNTS (TM_MAX_CLIENTS + TM_MAX_SHARED)
#define TM_UUID 16u
#define TM_MAX_UUIDS 16u
#define TM_MAX_THREADS 1024u
#define TM_NSHARDS 64u
#define TM_NAME 64u

/* Bins: one allocator each of equal-sized units. Persistent blocks share theirs, ephemeral ones belong to a
 * client's probation or main queue, leaves to a pool (so that a slot's pool follows from its chunk). */
#define BIN_PERSISTENT 0u
#define BIN_OBJECT 64u
#define BIN_NODE 65u
#define BIN_EPHEMERAL 66u
#define BIN_LEAF (BIN_EPHEMERAL + TM_NACCOUNTS * 2u * TM_NCLASSES)
#define TM_NBINS (BIN_LEAF + TM_MAX_POOLS * 3u)

/* Results of store operations; negative values are errors. */
enum {
    TM_MISS = 0,
    TM_OK = 1,
    TM_REFUSED = -1,  /* a put found no memory */
    TM_CORRUPT = -2,  /* a persistent page failed its checksum */
    TM_NOPOOL = -3,   /* the pool, client or segment is gone */
    TM_NOTHREAD = -4, /* no thread record is free, or no memory for the thread's buffers */
    TM_AGAIN = -5,    /* internal: the slot's leaf died, look up again */
    TM_SHUT = -14,    /* an import found the client or the segment frozen or off */
    TM_AWAY = -15,    /* internal: the page is in a tier, and its record has to be fetched first */
    TM_DOWN = -16,    /* a tier does not answer: the page is safe, but out of reach */
    TM_WAIT = -7      /* the client is being handed over: a device asks again */
};

/* ---- Slots ------------------------------------------------------------------------------------------------
 * bits 0..35 block reference, fill value, location in a tier, number of the slot of a twin's original or a page's pack, or
 * eviction time; 36..37 frequency; 38..40 type; 41..63 generation. A page that was evicted leaves the client's eviction clock in
 * its empty slot: the ghost of S3-FIFO; an ephemeral original always leaves something (twin.c). */
enum { SLOT_EMPTY = 0, SLOT_BLOCK = 1, SLOT_FILL = 2, SLOT_DEAD = 3, SLOT_TIER = 4, SLOT_TWIN = 5, SLOT_PACKED = 6 };
#define SLOT_VALUE ((UINT64_C(1) << 36) - 1)
#define SLOT_FREQ_ONE (UINT64_C(1) << 36)
#define SLOT_FREQ (UINT64_C(3) << 36)
#define SLOT_GEN_ONE (UINT64_C(1) << 41)
typedef _Atomic uint64_t slot_t;

static inline unsigned slot_type(uint64_t s) { return (unsigned)(s >> 38) & 7u; }
static inline unsigned slot_freq(uint64_t s) { return (unsigned)(s >> 36) & 3u; }
/* Whether it has another word than that, but for the frequency. */
static inline bool slot_changed(const slot_t *slot, uint64_t word)
{
    return ((atomic_load(slot) ^ word) & ~SLOT_FREQ) != 0;
}
/* Of a persistent pool while its client is handed over: CLEAN, exported and not changed since; STALE, exported and put
 * again since; and of an empty slot GONE, flushed since it was exported. The value of an empty slot has no other use
 * there; the frequency tells otherwise, if the client has a tier, that the page was used lately (demote.c), also in the
 * tier (promote.c). */
#define SLOT_CLEAN SLOT_FREQ_ONE
#define SLOT_STALE (SLOT_FREQ_ONE * 2)
#define SLOT_GONE UINT64_C(1)
static inline uint64_t slot_next(uint64_t old, unsigned type, uint64_t value)
{
    return ((old & ~(SLOT_GEN_ONE - 1)) + SLOT_GEN_ONE) | ((uint64_t)type << 38) | value;
}

/* ---- Shared structures ------------------------------------------------------------------------------------ */

/* A robust, process-shared mutex. Only lock.c touches it. */
struct tm_lock {
    pthread_mutex_t mutex;
};

/* How long operations of one kind took, of those that were timed. */
struct tm_timing {
    _Atomic uint64_t samples, total_ns, least_ns, most_ns;
    _Atomic uint64_t buckets[TM_BUCKETS]; /* how many samples took how long */
};
/* The kinds; the first are kept by client, too. */
enum { T_STORED, T_REFUSED, T_HIT, T_MISSED, T_CLIENT_KINDS };
enum { T_FLUSH = T_CLIENT_KINDS, T_FLUSH_OBJECT, T_COMPRESS, T_DECOMPRESS, T_EXPAND, T_KINDS };

struct tm_super {
    char magic[8];
    uint32_t version;
    uint32_t abi;          /* sizes of lock and records: another libc's segment is refused */
    uint64_t memory_bytes; /* the ceiling of everything, for which the tables were made */
    uint64_t file_bytes;
    uint64_t nonce;       /* tells one segment from another at the same path */
    uint64_t off_clients; /* offsets of the tables, in bytes */
    uint64_t off_pools;
    uint64_t off_threads;
    uint64_t off_bins;
    uint64_t off_buckets;
    uint64_t off_states;
    uint64_t off_descs;
    uint64_t off_touched;
    uint64_t off_times;
    uint64_t off_data;
    uint32_t nbuckets; /* power of two */
    uint32_t nchunks;
    uint64_t checksum; /* XXH3 of everything above */

    /* From here on it changes. */
    _Atomic uint32_t alive;   /* 1, or 0 once destroyed */
    _Atomic uint32_t mode;    /* of all clients at most */
    _Atomic uint32_t nfloors; /* clients with a floor: without any, nobody looks at them */
    _Atomic uint32_t recount; /* a thread died: page counters may be off */
    _Atomic uint32_t nthreads; /* thread records ever used */
    _Atomic uint32_t emptied;  /* objects that were flushed since empty ones were last looked for */
    _Atomic uint32_t look;     /* something else was emptied: a reaper should look */
    _Atomic uint32_t sweep;    /* chunk at which that look goes on */
    _Atomic uint64_t deaths;   /* threads repaired */
    _Atomic uint64_t recounts; /* times that the sums were corrected, or that this was begun; under the control lock */
    struct tm_lock control;   /* clients and pools tables */
    struct tm_lock chunk_lock; /* chunk states, the lists below, queues */
    struct tm_lock twin_lock;  /* only tried: making a slot a twin, and removing originals that have none; twin.c */
    uint32_t fresh;           /* first chunk never used */
    uint32_t free_head;       /* punched chunks, 1-based, 0 none */
    uint32_t ret_head;        /* free but backed chunks */
    uint32_t nfree;           /* length of the free list */
    _Atomic uint32_t nret;    /* length of the ret list */
    _Atomic uint32_t nused;   /* chunks in use, being populated or being punched */
    _Atomic uint32_t keep;    /* RET chunks that were asked for last: not to be punched as surplus */
    /* The bound, in chunks in use or backed; it moves below nchunks. See sizing.c. */
    _Atomic uint32_t limit;            /* for everybody */
    _Atomic uint32_t persistent_limit; /* for persistent pages that find nothing to evict; not below `limit` */
    _Atomic uint32_t size_least, size_most; /* between which the manager may move it; equal: it does not */
    struct tm_lock shards[TM_NSHARDS];

    /* Statistics. */
    _Atomic uint64_t failed;            /* operations that ended with an error */
    _Atomic uint64_t retired_operations; /* of pools that are no more */
    _Atomic uint64_t retired_evictions, retired_new;
    _Atomic uint64_t drains;            /* chunks drained to get memory */
    _Atomic uint64_t drains_most;       /* for one request */
    _Atomic uint64_t no_memory;
    _Atomic uint64_t trims, trimmed_bytes;
    _Atomic uint64_t relocated;         /* pages moved to free a chunk */
    _Atomic uint64_t compacted;         /* chunks freed so */
    _Atomic uint64_t shrinks;           /* times that the limit was lowered */
    _Atomic uint64_t squeezed;          /* loose pages compressed after all */
    _Atomic uint64_t squeezed_bytes;    /* memory that this saved */
    _Atomic uint64_t condensed;         /* cold pages stored smaller by the background pass */
    _Atomic uint64_t condensed_bytes;   /* memory that this saved */
    _Atomic uint64_t restored;          /* of those, pages that were hit again and stored as before */
    _Atomic uint64_t condensing_ns;     /* CPU time of the pass */
    _Atomic uint32_t condense_percent;  /* of one CPU that the manager may spend on it */
    _Atomic uint32_t orphans;           /* what there may be that no slot names */
    _Atomic uint64_t twins;             /* pages that became twins */
    _Atomic int64_t twin_bytes;         /* memory that this saved */
    _Atomic uint64_t twin_ns;           /* CPU time of the pass that looks for them */
    _Atomic uint64_t most[5];           /* maxima: pages, ephemeral pages, objects, nodes, chunks in use */
    struct tm_timing timing[T_KINDS];
    _Atomic uint32_t tier_cold_s;       /* persistent pages that nobody used for so long go to a tier; 0: none do */
    _Atomic uint64_t restored_bytes;    /* memory that restored pages took again */
    _Atomic uint64_t squeezing_ns;      /* what it took to compress loose pages in evictions */
    _Atomic uint64_t compacting_ns;     /* what it took to move pages together, whoever did */
    _Atomic uint32_t pack;              /* cold neighbours may be packed together */
    _Atomic uint32_t condense_level;    /* of zstd, for both; 0: the usual one (condense_level in codec.c) */
    _Atomic uint64_t packed;            /* pages that were */
    _Atomic int64_t packed_bytes;       /* memory that this saved */
    _Atomic uint64_t unpacked;          /* of those, pages that got a block of their own again */
    _Atomic uint64_t packing_ns;        /* CPU time of the pass that packs */
    _Atomic int64_t pack_losses;        /* pages that have left packs which are still there: memory that is dead in them */
};
enum { ORPHAN_ORIGINALS = 1, ORPHAN_PACKS = 2 }; /* or packs that their pages have left */
enum { MOST_PAGES, MOST_EPHEMERAL, MOST_OBJECTS, MOST_NODES, MOST_CHUNKS };

/* Of what one client asked for; a table of its own, so that a sample touches no line of a client's accounting. */
struct tm_times {
    _Alignas(64) struct tm_timing timing[T_CLIENT_KINDS];
};

struct tm_queue { /* a client's ephemeral chunks, oldest first */
    uint32_t head, tail; /* 1-based */
    _Atomic uint32_t length;
};
enum { QUEUE_PROBATION, QUEUE_MAIN };

enum { MODE_ON, MODE_FROZEN, MODE_OFF };
enum { PHASE_NONE, PHASE_COPYING, PHASE_FROZEN, PHASE_DEPARTED }; /* of a handoff */
/* Of a client: LZ4, nothing, or what suits: ephemeral pages raw as long as there is memory in plenty, else LZ4. */
enum { CODEC_LZ4, CODEC_NONE, CODEC_AUTO };
enum { FREE, LIVE, DYING, STAGED }; /* states of clients and pools; STAGED clients are seen by their maker only */

/* A client, and behind those the accounts of the shared pools, of which only the sums and queues are used. */
struct tm_client {
    char name[TM_NAME];
    _Atomic uint32_t state;
    _Atomic uint32_t serial;
    _Atomic uint64_t cap_bytes;
    _Atomic uint64_t floor_bytes;
    _Atomic int64_t used_bytes; /* memory of all blocks of the account */
    _Atomic uint64_t evict_clock; /* pages evicted so far: the time of ghosts */
    struct tm_queue queues[2];
    _Atomic uint32_t weight;
    _Atomic uint32_t codec;
    _Atomic uint32_t mode;
    _Atomic uint32_t phase;
    _Atomic uint32_t copier; /* thread index + 1 of who hands it over */
    _Atomic uint32_t stager; /* thread index + 1 of who fills it */
    _Atomic uint32_t held;   /* 0 never, 1 by a living thread, 2 not any more */
    _Atomic uint32_t uuids_used; /* one bit for each of `uuids` */
    uint8_t uuids[TM_MAX_UUIDS][TM_UUID]; /* shared pools that it may join */
    _Atomic uint64_t no_memory;
    _Atomic uint64_t busy_ns;
    _Atomic int64_t ephemeral, ephemeral_most; /* pages of the account */
    _Atomic uint64_t retired_puts, retired_hits[2]; /* of its pools that are no more; hits by persistent */
    _Atomic uint32_t index_chunks; /* of leaves of its own pools; under the chunk lock */
    _Atomic uint32_t departed; /* serial of the client of this number that departed last, 0 none */
    _Atomic uint32_t begun; /* chunks that entered its probation queue so far: the time of their ages */
    _Atomic uint32_t tiered; /* it has a tier: uses of its persistent pages are noted */
    _Atomic uint32_t tier_epoch; /* how often it was given a tier: processes that read the one before notice */
    _Atomic uint64_t unreachable; /* gets that ended because its tier did not answer */
    _Atomic uint32_t dedup; /* its equal pages may be kept once */
    uint8_t spare[4];
};

/* Counters of a pool, semantics section 6. */
enum {
    C_PUTS, C_STORED, C_REFUSED, C_REPLACED, C_PUT_FLUSHED, C_GETS, C_HITS, C_FLUSHES, C_FLUSHED,
    C_OBJECT_FLUSHES, C_OBJECTS_FLUSHED, C_EVICTIONS, C_CORRUPT, C_TAKEN, C_DROPPED, C_DEMOTED, C_FETCHED,
    C_PREFETCHED, C_NCOUNTERS
};

struct tm_pool {
    _Atomic uint32_t state;
    _Atomic uint32_t serial;
    uint32_t persistent;
    uint32_t exclusive;
    uint32_t link;            /* number of the shared pool that this is a membership of, 0 none */
    _Atomic uint32_t owner;   /* of a shared pool: the client that pays */
    _Atomic uint64_t sharers; /* of a shared pool: one bit a client */
    uint8_t uuid[TM_UUID];
    _Atomic int64_t pages_most, objects, objects_most, nodes, nodes_most;
    _Atomic int64_t pages;
    _Atomic int64_t fill_pages;
    _Atomic int64_t raw_pages;
    _Atomic int64_t tier_pages; /* in a tier, not in memory */
    _Atomic int64_t twin_pages; /* kept in their originals */
    _Atomic int64_t packed_pages; /* kept in packs */
    _Atomic int64_t bytes;
    _Atomic uint64_t counters[C_NCOUNTERS];
    uint8_t spare[320 - 144 - 8 * C_NCOUNTERS];
};

/* A thread of some process. Holding `life` is being alive: the kernel marks it when the thread ends in any way. */
struct tm_thread {
    _Alignas(64) struct tm_lock life;
    _Atomic uint32_t used; /* has intents to look at */
    uint32_t pid;          /* for people only */
    _Atomic uint64_t op;   /* odd inside an operation */
    _Atomic uint64_t fetching; /* odd while it holds or reads records of a tier, and then whose; see fetching_begin */
    uint32_t seq;          /* of the stamps */
    _Atomic uint64_t serves; /* clients that it holds, one bit each */
    _Atomic uint32_t commits; /* its staged clients are to be shown, not to be destroyed */
    /* Intents. */
    _Atomic uint32_t new_stamp, old_stamp;
    _Atomic uint64_t new_block; /* allocated, perhaps not yet in its slot */
    _Atomic uint64_t old_block; /* perhaps taken out of its slot, not yet freed */
    _Atomic uint32_t chunk;     /* 1-based: taken or emptied by us, perhaps in no list */
    _Atomic uint32_t drain;     /* 1-based: taken from its queue to be emptied */
    _Atomic uint32_t meta_new;  /* allocated, perhaps not yet linked ... */
    _Atomic uint64_t meta_parent; /* ... to this word (offset), or this bucket (offset + 1) */
    _Atomic uint32_t meta_old;  /* unlinked, perhaps not yet freed */
    _Atomic uint32_t dying;     /* object whose slots we are killing */
    _Atomic uint32_t doomed;    /* list of unlinked objects that wait for a grace period to be freed */
    _Atomic uint64_t changes;   /* of the sums that it has made, ever: the recount must see them; counted behind those */
};

struct tm_bin {
    struct tm_lock lock;
    uint32_t partial; /* chunks with a free unit, 1-based list */
    _Atomic uint32_t ready; /* the lock was initialised */
    _Atomic uint32_t room;  /* free units in all its chunks but those that somebody owns; derived */
    uint8_t spare[12];
};

enum { CHUNK_FREE = 0, CHUNK_RET, CHUNK_USED, CHUNK_BUSY };
enum {
    CF_LISTED = 1, /* in the bin's partial list */
    CF_OWNED = 2   /* some thread fills, drains or releases it: nobody else may list it or allocate in it */
};
struct tm_chunk {
    uint16_t bin;
    uint16_t flags;  /* under the bin's lock while the chunk is USED, else under the chunk lock */
    uint16_t nfree;  /* likewise */
    uint16_t queued; /* 0, or QUEUED and when it entered its client's queue; written under the chunk lock */
    uint32_t next;   /* in the bin's partial list, or in the free or ret list; 1-based */
    uint32_t prev;   /* in the partial list; of an OWNED or BUSY chunk: the owner's thread index */
    uint32_t qnext, qprev; /* queue */
    uint64_t bitmap[8];
};

#define QUEUED 0x8000u
#define QUEUE_TIME (QUEUED - 1)

/* When pages were put or got, by the KiB of the chunk in which their blocks begin: one bit each. A hint, which a
 * reader may set for a block that is just being freed: then another page looks warm for a while. */
struct tm_touched {
    _Atomic uint64_t now;    /* since the pass that condenses cold pages last came by */
    _Atomic uint64_t before; /* between the two last times; only the pass writes this */
};

struct tm_block { /* header of a block; the payload follows */
    _Atomic uint64_t word; /* slot number 40, payload length 13, form 11 */
    _Atomic uint32_t stamp;
    uint32_t checksum;
};
#define TM_HEADER ((uint32_t)sizeof(struct tm_block))
/* What the payload is. LOOSE: the page itself, only because there was memory in plenty; it is compressed before
 * anything is evicted for want of that. */
enum block_kind { BLOCK_LZ4, BLOCK_RAW, BLOCK_LOOSE, BLOCK_ZSTD, BLOCK_PACK };
/* A block's form is its kind, 3 bits, and above that, of a condensed page, the size class that it had before, plus 1 (0: not
 * known): so what it saves follows from the block alone, for as long as there is one, and nothing has to be kept in step. */
static inline uint32_t condensed_form(uint32_t before) { return BLOCK_ZSTD | (before + 1) << 3; }
static inline uint32_t form_before(uint32_t form) { return form >> 3; } /* class + 1, or 0 */
/* And of a pack, which slots of its group have their pages in it: one bit each. */
#define TM_GROUP 4u /* slots, aligned */
static inline uint32_t pack_form(uint32_t members) { return BLOCK_PACK | members << 3; }
static inline uint32_t form_members(uint32_t form) { return form >> 3; }

/* The slot that a block's header word names, and whether a slot's word refers to a block. */
static inline uint64_t header_slot(uint64_t word) { return word & ((UINT64_C(1) << 40) - 1); }
static inline bool slot_refers(uint64_t word, uint64_t block)
{
    return slot_type(word) == SLOT_BLOCK && (word & SLOT_VALUE) == block;
}

struct tm_object {
    uint64_t oid[3];
    _Atomic uint32_t next; /* in the bucket's chain */
    uint32_t pool;
    _Atomic uint32_t state; /* 1 live, 2 dying */
    _Atomic uint32_t tiny, small; /* leaves of indexes 0..15 and 16..63 */
    _Atomic uint32_t leaf[8];     /* 64..511, then 512 each up to 4095 */
    _Atomic uint32_t root[8];     /* two levels of nodes above the leaves for the rest */
    uint32_t batch; /* next on the list of doomed objects */
    uint32_t owner; /* thread index + 1 of who destroys it */
    _Atomic uint32_t user; /* client + 1 that used it last: of a shared pool */
    uint32_t spare[2];
};

/* The tables begin behind it: one more word moves them, and is another layout. */
_Static_assert(sizeof(struct tm_lock) != 40 || sizeof(struct tm_super) <= 5312, "superblock");
_Static_assert(sizeof(struct tm_client) == 512, "client");
_Static_assert(sizeof(struct tm_pool) == 320, "pool");
_Static_assert(sizeof(struct tm_thread) % 64 == 0, "thread");
_Static_assert(sizeof(struct tm_bin) == 64, "bin");
_Static_assert(sizeof(struct tm_chunk) == 88, "chunk");
_Static_assert(sizeof(struct tm_block) == 16, "block");
_Static_assert(sizeof(struct tm_object) == 128, "object");

/* ---- Process-local ---------------------------------------------------------------------------------------- */

struct tm_ctx;
struct tm_pass { /* over the slots of all leaves; pass.c */
    _Atomic uint32_t busy; /* one at a time */
    void *memory;          /* what it remembers, made when it is first needed; of whom has it busy */
};
#define TM_CONDENSERS 3u /* kept for later: the manager compresses in so many threads at a time at most */
struct tm_segment {
    uint8_t *base;
    size_t size;
    int fd;
    char *path;
    struct tm_super *super;
    struct tm_client *clients;
    struct tm_pool *pools;
    struct tm_thread *threads;
    struct tm_bin *bins;
    _Atomic uint32_t *buckets;
    _Atomic uint8_t *states;
    struct tm_chunk *chunks;
    struct tm_touched *touched; /* by chunk */
    struct tm_times *times;     /* by client */
    uint64_t *_Atomic vain;     /* of this process: by chunk, KiB whose blocks could not be made smaller; or NULL */
    struct tm_pass pairing, packing; /* of this process */
    void *_Atomic condensers[TM_CONDENSERS]; /* of this process: states of zstd for compression that nobody is using */
    _Atomic uint64_t condenser_bytes; /* memory of those, and of those in use */
    uint64_t data_offset;
    uint32_t nchunks;
    uint32_t id;             /* unique in this process */
    /* Reads the records that the context's window wants; outside of operations. TM_OK if the first is held now, or an
     * error. NULL: nobody here can. */
    int (*fetch)(struct tm_ctx *ctx, uint32_t client);
    void *fetcher;           /* whatever `fetch` needs */
    _Atomic uint32_t compact_from; /* of this process: the chunk with which tm_compact goes on */
    _Atomic uint32_t users;  /* threads of this process that hold a record */
    _Atomic uint32_t closed;
};

/* Records of a tier that a thread has read for the request that it serves. tier.c. */
#define TM_FETCH 8u       /* locations at a time: what the kernel reads ahead in swap */
#define TM_WRONG_MOST 3u  /* reads of a record that is not what it should be: then it is corrupt */
#define TM_WINDOW 40960u  /* so many of average size in one piece, or four that do not compress */
struct tm_window {
    uint64_t until_ns;  /* when to give up on a tier that does not answer; 0: it does */
    bool open;         /* our record's `fetching` is odd: nothing that a slot has named since is used again */
    uint32_t wrong;    /* records that were not what they should be */
    uint32_t nwanted;  /* locations to fetch: the last operation ended in TM_AWAY */
    uint32_t nheld;
    uint64_t wanted[TM_FETCH];
    struct tm_held {
        uint64_t location;   /* 0: of no use any more */
        uint32_t at, length; /* in `bytes`: the record begins there, and there are no more bytes than that */
    } held[TM_FETCH];
    _Alignas(4096) uint8_t bytes[TM_WINDOW];
};

#define TM_SCRATCH 4352u
/* One thread's view of one segment: its record and its buffers. */
struct tm_ctx {
    struct tm_ctx *next;
    struct tm_segment *seg;
    struct tm_thread *rec;
    uint32_t index;    /* of rec */
    uint32_t segment;  /* seg->id, to tell a stale entry */
    uint32_t fork;     /* fork generation at registration */
    uint32_t ticks;    /* operations until the next look at what should be returned to the system */
    uint32_t pool;     /* of the operation under way: the pool itself, not a membership */
    uint32_t client;   /* that asked */
    uint32_t payer;    /* for the pool's pages */
    uint64_t began_ns; /* of an operation that is timed, else 0 */
    void *expander;    /* zstd's state for decompression; made with the rest, so that no get has to ask for memory */
    const uint8_t *next_payload; /* of the block that is read after this one, NULL: there is none, or it is not known */
    _Alignas(16) uint8_t lz4[16416];
    _Alignas(64) uint8_t scratch[TM_SCRATCH];
    _Alignas(64) uint8_t page[TM_PAGE];
    /* Of whom moves pages, while the others hold what a put brings: nothing is kept here while anything is allocated that
     * others may be evicted for, as new leaves may be. */
    _Alignas(64) uint8_t moved[TM_PAGE];
    _Alignas(64) uint8_t packed[TM_SCRATCH];
    struct tm_window window;
    /* The pages of the pack that was read last: who reads its neighbours next need not expand it again. */
    struct {
        uint64_t pack, word, header, group; /* its slot's number, that slot's word, of its block; pack 0: none */
        uint32_t stamp, checksum;
        _Alignas(64) uint8_t pages[TM_GROUP * TM_PAGE];
    } unpacked;
};

struct tm_handle { /* a pool as an operation names it */
    struct tm_segment *seg;
    uint32_t pool;   /* client * TM_CLIENT_POOLS + id */
    uint32_t serial; /* of the pool */
};

/* lock.c: EOWNERDEAD is reported by `true`; the caller repairs what the lock guards, then goes on. */
void lock_init(struct tm_lock *lock);
bool lock_take(struct tm_lock *lock);
void lock_drop(struct tm_lock *lock);
enum { LIFE_TAKEN, LIFE_FREE, LIFE_DEAD };
void continue_if_stopped(int tid); /* a thread, or a process, for which others wait */
int lock_try_life(struct tm_lock *lock); /* FREE and DEAD: the caller holds it now */

/* segment.c; errors are negative errno values or SEG_ codes */
enum { SEG_FOREIGN = -1001, SEG_VERSION = -1002, SEG_DAMAGED = -1003, SEG_SHORT = -1004, SEG_ABI = -1005,
       SEG_TOO_SMALL = -1006, SEG_TOO_LARGE = -1007 };
int tm_create(const char *path, uint64_t memory_bytes, struct tm_segment **out);
int tm_attach(const char *path, struct tm_segment **out);
int tm_destroy(const char *path);
void tm_close(struct tm_segment *seg);

/* thread.c */
struct tm_ctx *ctx_get(struct tm_segment *seg); /* NULL: no record or memory */
void ctx_release(struct tm_segment *seg);       /* of the calling thread */
void op_begin(struct tm_ctx *ctx);
void op_end(struct tm_ctx *ctx);
bool grace(struct tm_ctx *ctx, unsigned timeout_ms); /* every operation that was running has ended */
unsigned tm_reap(struct tm_ctx *ctx);

void client_release(struct tm_ctx *ctx, uint32_t index); /* client.c: what thread `index` held has no holder now */

/* repair.c */
bool repair_thread(struct tm_ctx *ctx, uint32_t index); /* false: must be tried again */
void repair_bin(struct tm_segment *seg, uint32_t bin);
void repair_chunks(struct tm_segment *seg);
void recount(struct tm_ctx *ctx);

/* alloc.c */
extern const uint16_t tm_strides[TM_NCLASSES];
extern uint8_t tm_classes[TM_STRIDE_RAW / 16 + 1]; /* the class of a block, by its size in units of 16 bytes */
void bin_ready(struct tm_segment *seg, uint32_t bin);
uint32_t bin_stride(uint32_t bin);
struct tm_bin *bin_lock(struct tm_segment *seg, uint32_t bin); /* taken, and repaired if its holder died */
/* Sets new_block; 0: none. ALLOC_RESERVE: the reserve may be used; ALLOC_LISTED: only chunks in use already; ALLOC_SPARE:
 * also free ones, half of the reserve among them, but nothing is evicted. */
enum alloc { ALLOC_NORMAL, ALLOC_RESERVE, ALLOC_LISTED, ALLOC_SPARE };
uint64_t block_alloc(struct tm_ctx *ctx, uint32_t bin, enum alloc how);
void block_free_old(struct tm_ctx *ctx);               /* frees and clears old_block */
void block_free_new(struct tm_ctx *ctx);               /* frees and clears new_block */
void block_free_locked(struct tm_ctx *ctx, struct tm_bin *b, bool old); /* the same with its bin locked, which is dropped */
uint32_t meta_alloc(struct tm_ctx *ctx, uint32_t bin); /* sets meta_new */
void meta_free(struct tm_ctx *ctx, uint32_t ref);      /* sets and clears meta_old */
void meta_free_new(struct tm_ctx *ctx);
/* Before emptying a chunk: it must still be of `bin`, as when its number was found, and nobody else's. */
bool chunk_own(struct tm_ctx *ctx, uint32_t c, uint32_t bin);
/* Is chunk `c` in use by `bin`, which is locked; and is it owned, by whom? A chunk that is not may become another bin's this
 * moment, and `prev` be an owner or a link: only with the chunk lock as well, taken here, do they belong together. */
bool chunk_is_owned(struct tm_segment *seg, uint32_t c, uint32_t bin, bool *owned, uint32_t *owner);
bool chunk_settle(struct tm_ctx *ctx, uint32_t c); /* one that we own: list it, or release it if empty (true) */
uint64_t block_place(struct tm_segment *seg, uint64_t block, uint32_t *c, uint32_t *bit); /* 0: not a block */
uint64_t meta_place(struct tm_segment *seg, uint32_t ref, uint32_t *c, uint32_t *bit);
static inline bool bit_is_set(const struct tm_chunk *d, uint32_t bit) { return d->bitmap[bit / 64] >> (bit % 64) & 1; }

/* chunk.c */
void chunks_lock(struct tm_segment *seg); /* taken, and repaired if its holder died */
void chunks_unlock(struct tm_segment *seg);
uint32_t chunk_take(struct tm_ctx *ctx, uint32_t bin, enum alloc how); /* 1-based, 0 none; OWNED */
uint32_t chunks_available(struct tm_segment *seg, uint32_t limit); /* that a put could take; exact under the chunk lock */
uint32_t chunks_kept(const struct tm_segment *seg); /* which only the relocation of hot ephemeral pages may take */
void chunk_release(struct tm_ctx *ctx, uint32_t c); /* an OWNED one; clears intent chunk */
void chunk_requeue(struct tm_ctx *ctx, uint32_t c); /* clears intent drain */
uint32_t queue_pop(struct tm_ctx *ctx, uint32_t account, unsigned queue, uint32_t *bin); /* 1-based; sets intent drain */
bool block_is_young(struct tm_segment *seg, uint64_t block); /* in the youngest third of a probation queue */
uint64_t tm_populate(struct tm_ctx *ctx, uint64_t bytes);
uint64_t tm_trim(struct tm_ctx *ctx, uint64_t keep_bytes);
void chunk_maintain(struct tm_ctx *ctx); /* outside operations: give much free memory back */
bool chunk_free_busy(struct tm_ctx *ctx, uint32_t owner); /* what a dead thread populated or punched */

/* checksum.c */
uint64_t checksum_wide(const uint8_t *data, size_t length);
/* checksum_copy.c: of a page, which is copied meanwhile; what is hashed next, at `next`, is brought from memory. */
uint64_t checksum_wide_copy(const uint8_t *page, uint8_t *to, const uint8_t *next);

/* codec.c */
bool codec_fill(const uint8_t *page, uint64_t *value); /* same-filled, and the word fits a slot */
void codec_expand(uint64_t value, uint8_t *page);
uint32_t codec_compress(struct tm_ctx *ctx, const uint8_t *page, uint8_t *to); /* length; TM_PAGE: it does not pay */
uint64_t codec_checksum(const uint8_t *data, size_t length); /* XXH3, 64 bits */
void block_write(struct tm_block *b, uint64_t slot, uint32_t form, uint32_t length, const uint8_t *payload);
uint32_t block_checksum(const struct tm_block *b, uint64_t word, uint32_t stamp);
uint32_t block_length(uint64_t word);
enum block_kind block_kind(uint64_t word);
uint32_t block_form(uint64_t word);
bool block_read(struct tm_ctx *ctx, const struct tm_block *b, uint64_t slot, uint64_t most, uint8_t *page); /* most: bytes there */
/* With zstd. The passes in the background use the segment's level; LEVEL_AT_ONCE is for what must be quick, two thirds of the
 * time of the usual one for a single page, and one per cent more memory. */
enum { LEVEL_AT_ONCE = 1, LEVEL_USUAL = 3, LEVEL_MOST = 19 };
int condense_level(const struct tm_segment *seg);
uint32_t codec_condense(struct tm_segment *seg, int level, const uint8_t *page, uint8_t *to); /* as codec_compress */
/* `n` pages as one frame: its bytes; 0: more than that, or no memory. */
uint32_t codec_pack(struct tm_segment *seg, int level, const uint8_t *pages, uint32_t n, uint8_t *to, uint32_t most);
bool codec_unpack(struct tm_ctx *ctx, const uint8_t *payload, uint32_t length, uint8_t *pages, uint32_t n);
void *codec_expander(void); /* NULL: no memory */
void codec_expander_free(void *expander);
void codec_close(struct tm_segment *seg);

/* Where the passes in the background go on: in which chunk, and there from which KiB, or slot of its leaves, on. */
#define TM_PLACES (TM_CHUNK / 8)
/* dense.c: the background pass. One visit of chunks from `first` on, for most_ns of CPU time; where to go on. Adds to `found`,
 * unless that is NULL, what is condensed now in the chunks that it has visited, so that it has all of it after a whole round;
 * what is moved meanwhile may be missed, or be there twice. */
enum { CONDENSE_PERSISTENT = 1, CONDENSE_EPHEMERAL = 2, CONDENSE_LOOSE = 4, CONDENSE_ALL = 8 };
struct tm_condensed {
    uint64_t pages;
    int64_t saved; /* bytes, to what they took before */
    uint64_t packed;      /* of those, pages in packs */
    int64_t packed_saved; /* and beyond that, to a block for each */
};
uint64_t tm_condense(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, unsigned what, uint64_t *spent_ns,
                     struct tm_condensed *found);

/* twin.c: equal pages of a client or of a shared pool, kept once */
static inline bool is_originals(uint32_t pool) /* one of the core's own */
{
    return pool < TM_FIRST_SHARED ? pool % TM_CLIENT_POOLS >= TM_USER_POOLS : pool >= TM_FIRST_SHARED_ORIGINALS;
}
uint32_t originals_of(const struct tm_segment *seg, uint32_t pool); /* where the originals of that pool's twins are */
/* The slot of a twin's original, from the twin's pool and word; NULL if the word is damaged. */
slot_t *twin_original(struct tm_segment *seg, uint32_t pool, uint64_t word);
bool original_is_evicted(const struct tm_segment *seg, uint32_t originals, uint64_t word); /* and may still be named */
uint64_t original_trace(const struct tm_segment *seg, uint32_t pool, uint64_t ghost); /* the value of a slot whose page goes */
int twin_get(struct tm_ctx *ctx, uint32_t pool, uint64_t word, uint8_t *page); /* as slot_get; the caller looks again */
bool twin_is_gone(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word); /* whose original could not be read */
enum { TM_RESCUES = 64 }; /* of a put: some 40 ms, in which a thousand packs are taken apart */
bool twin_rescue(struct tm_ctx *ctx); /* inside an operation, where memory is short: originals without twins go, and dead packs */
bool twins_lock(struct tm_segment *seg); /* tried */
#define TWINS_PATIENCE 1000u /* times that a put that needs memory tries to get it */
bool twins_lock_within(struct tm_segment *seg, unsigned *patience); /* tried so often, which is counted down; NULL: once */
void twins_unlock(struct tm_segment *seg);
void twins_sweep(struct tm_ctx *ctx); /* all originals without twins, and twins without originals, of everybody */

/* pair.c */
/* The background pass: one visit of chunks from `first` on, for most_ns of CPU time; where to go on. `warm`: also pages
 * that were used lately. */
uint64_t tm_dedup(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns);
void twins_free(struct tm_segment *seg);

/* pass.c: what these passes, and that of packing.c, have in common */
struct tm_walk {
    uint32_t step; /* slots that are visited together */
    bool (*may)(struct tm_segment *seg, uint32_t pool); /* are slots of that pool visited? Inside an operation: it stays so */
    uint32_t (*makes_in)(const struct tm_segment *seg, uint32_t pool); /* the pool in which it makes something for that one */
    /* Inside an operation; `warm`: also pages that were used lately. False: there was nothing to do, which took no time. */
    bool (*visit)(struct tm_ctx *ctx, void *memory, uint32_t pool, uint64_t number, bool warm);
};
/* What it remembers, made by `make` when it is first needed. NULL: no memory, or another thread is at it. */
void *pass_begin(struct tm_segment *seg, struct tm_pass *p, void *(*make)(const struct tm_segment *seg));
void pass_end(struct tm_pass *p);
/* From `place` on, until_ns of our CPU time; where to go on, 0: all was visited. */
uint64_t pass_walk(struct tm_ctx *ctx, const struct tm_walk *w, void *memory, uint64_t place, uint64_t until_ns, bool warm);
bool block_is_warm(struct tm_segment *seg, uint64_t block); /* used since the pass of dense.c came by for the last time but one */
/* A free slot of a pool of the core's own, from index `*hand` on; NULL: no memory, or there are many others before it. A new
 * leaf may have pages evicted for it. */
slot_t *free_slot(struct tm_ctx *ctx, uint32_t pool, uint32_t *hand, uint64_t *word);

/* pack.c: cold neighbours of persistent pools in one block */
static inline bool is_packs(uint32_t pool) { return pool < TM_FIRST_SHARED && pool % TM_CLIENT_POOLS == TM_CLIENT_POOLS - 1; }
static inline uint32_t packs_of(uint32_t pool) { return pool / TM_CLIENT_POOLS * TM_CLIENT_POOLS + TM_CLIENT_POOLS - 1; }
/* A pack's payload begins with its group's number, that of its first slot, and for each page, of the block that it had: its
 * size class, and form_before. */
enum { PACK_NUMBER = 5, PACK_OF_EACH = 2, PACK_LEAST_GAIN = 64 /* bytes that it must save */ };
static inline uint32_t pack_count(uint32_t members) { return (uint32_t)__builtin_popcount(members); }
static inline uint32_t pack_head(uint32_t members) { return PACK_NUMBER + PACK_OF_EACH * pack_count(members); }
/* The page of a slot of that word; as slot_get, but never away. The caller looks again. */
int pack_get(struct tm_ctx *ctx, uint32_t pool, const slot_t *slot, uint64_t word, uint8_t *page);
/* Of the block of the pack that the slot's word names, 0: it is none of this slot's group. */
uint32_t pack_stamp(struct tm_segment *seg, uint32_t pool, const slot_t *slot, uint64_t word);
/* The pack in that slot, as it was seen: counted to `found`, or taken apart if its pages would take less by themselves or it is
 * `hot`, and removed if all are gone. Inside an operation. */
void pack_tend(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, bool hot, struct tm_condensed *found);
/* The same by who would move it otherwise: taken apart if that saves half of it. */
void pack_gather(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word);
bool packs_rescue(struct tm_ctx *ctx); /* as twin_rescue */
/* Remove the pack of that slot if no slot names it; `patience` as in twins_lock_within. */
bool pack_remove(struct tm_ctx *ctx, uint32_t packs, slot_t *slot, unsigned *patience);
void pack_lose(struct tm_segment *seg, int64_t pages); /* so many more have left packs that stay; or fewer */
/* The page of that slot has just left the pack that `word` names; the last one takes it along. */
void pack_left(struct tm_ctx *ctx, uint32_t pool, const slot_t *slot, uint64_t word);
/* Take apart packs that have lost pages: one visit of chunks from `first` on, for most_ns of CPU time; where to go on. */
uint64_t tm_unpack(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, uint64_t *spent_ns);
/* Is there a pack in `b` that can be expanded, and does it have the page of slot `number`? For the check. */
bool pack_holds(struct tm_ctx *ctx, const struct tm_block *b, uint64_t number);

/* packing.c */
/* The background pass: one visit of chunks from `first` on, for most_ns of CPU time; where to go on. `warm`: also pages that
 * were used lately. */
uint64_t tm_pack(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns);
void packs_free(struct tm_segment *seg);

/* index.c */
struct cursor { /* where consecutive indexes of one object have their slots; {0} to begin with */
    uint32_t object;      /* meta reference, 0 not looked up or absent */
    uint32_t first, last; /* indexes covered */
    slot_t *slots;        /* of index `first`; NULL: no leaf there (or nothing looked up) */
    bool valid;           /* first, last and slots hold */
};
uint64_t object_hash(uint32_t pool, const uint64_t oid[3]);
struct tm_lock *shard_of(struct tm_segment *seg, uint64_t hash);
uint32_t object_find(struct tm_segment *seg, uint32_t pool, const uint64_t oid[3]);
void cursor_find(struct tm_segment *seg, uint32_t pool, const uint64_t oid[3], uint32_t index, struct cursor *cur);
int cursor_create(struct tm_ctx *ctx, uint32_t pool, const uint64_t oid[3], uint32_t index, struct cursor *cur);
int slot_pool(struct tm_segment *seg, uint64_t number); /* pool of a slot number, -1 if it is none */
/* The pool of the leaf that has slot `number`, -1: there is none. For a word that was read before: leaves begin empty, so that
 * word is the pool's, and still there if it can be swapped. */
int leaf_pool(struct tm_segment *seg, uint64_t number);

/* object.c: what happens to whole objects */
enum { UNIT_TINY, UNIT_SMALL, UNIT_FULL, UNIT_NODE }; /* leaves of 16, 64, 512 slots; in the order of their bins */
typedef bool (*unit_visitor)(void *arg, unsigned kind, uint32_t ref, _Atomic uint32_t *parent, uint32_t first);
bool object_visit(struct tm_segment *seg, struct tm_object *o, unit_visitor visit, void *arg); /* children first */
int64_t object_flush(struct tm_ctx *ctx, struct tm_object *o);
int64_t object_units(struct tm_segment *seg, struct tm_object *o); /* leaves and nodes */
uint32_t object_at(struct tm_segment *seg, uint32_t pool, uint32_t c, uint32_t bit); /* inside an operation; 0: none */
/* Of `serial`, if it has not become another pool meanwhile: flush its objects, those of `user` (0: of everybody); say that nothing
 * has been exported. */
void pool_drop(struct tm_ctx *ctx, uint32_t pool, uint32_t serial, uint32_t user);
void pool_unmark(struct tm_ctx *ctx, uint32_t pool, uint32_t serial);
void object_repair(struct tm_ctx *ctx); /* go on with the object that a dead thread was destroying, in its operation */
bool object_finish(struct tm_ctx *ctx); /* free the doomed objects, when nobody can look at them any more; false: not yet */
unsigned object_reap_empty(struct tm_ctx *ctx, unsigned most); /* outside operations */
/* Outside operations: destroy all objects of a dying pool. */
bool pool_sweep(struct tm_ctx *ctx, uint32_t pool, uint32_t serial);
static inline uint32_t unit_slots(unsigned kind) { return kind == UNIT_TINY ? 16 : kind == UNIT_SMALL ? 64 : 512; }

/* transfer.c: records of pages, see Exporter in _native.pyi */
struct tm_export {
    struct tm_handle pool;
    bool changes;
    uint32_t chunk, bit; /* of the object */
    uint64_t index;
};
enum { TM_MALFORMED = -8 };
int64_t tm_export_fill(struct tm_export *e, uint8_t *buffer, size_t size); /* bytes, 0 at the end, or an error */
int64_t tm_import(const struct tm_handle *h, const uint8_t *records, size_t size); /* records, or an error */

/* slot.c and store.c; `slot` level operations run inside an operation */
struct content { /* what a put stores: a fill value, or `length` bytes of payload */
    bool fill;
    uint64_t value;
    uint32_t form; /* of its block */
    uint32_t length;
    const uint8_t *payload;
};
/* What a refused put leaves: a miss, or what was there; the latter also if it shall wait for a handoff (TM_WAIT), or if it
 * is nobody's put and only for memory that is free. */
enum keep { KEEP_NOTHING, KEEP_OLD, KEEP_OR_WAIT, KEEP_IF_SPARE };
int slot_store(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, struct content *what, enum keep keep,
               const uint64_t *expected);
bool slot_stored(uint64_t word);
bool refuses_puts(const struct tm_ctx *ctx); /* of its client, now */
/* As cursor_create, but makes nothing for a page that will be refused; `page` NULL: not known yet. */
int cursor_for_put(struct tm_ctx *ctx, const uint64_t oid[3], uint32_t index, const uint8_t *page, enum keep keep,
                   struct cursor *cur);
/* As cursor_create in ctx->pool, for a page that is to be stored: packs and originals that nobody needs give way to it, too. */
int cursor_make(struct tm_ctx *ctx, const uint64_t oid[3], uint32_t index, struct cursor *cur);
int enter(const struct tm_handle *h, struct tm_ctx **ctx); /* op_begin, if the pool lives and has not departed */
int enter_departed(const struct tm_handle *h, struct tm_ctx **ctx); /* also if it has */
int again(const struct tm_handle *h, struct tm_ctx **ctx, unsigned tries);
int slot_put(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, const uint8_t *page, enum keep keep,
             const uint64_t *expected);
int slot_get(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint8_t *page, uint64_t *seen);
int slot_flush(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, unsigned type); /* leaves EMPTY or DEAD; 1: a page went */
bool slot_replace(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t *old, uint64_t new_word);
int64_t tm_put(const struct tm_handle *h, const uint8_t *oid, uint32_t index, const uint8_t *data, uint32_t n,
               enum keep keep);
int64_t tm_get(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint8_t *data, uint32_t n);
int64_t tm_flush(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint64_t n);
int64_t tm_flush_object(const struct tm_handle *h, const uint8_t *oid);
/* Calls `run` for each run of stored pages (`stored`) and of absent ones in order, until it returns false. */
int64_t tm_runs(const struct tm_handle *h, const uint8_t *oid, uint32_t index, uint64_t n,
                bool (*run)(void *arg, uint64_t first, uint64_t n, bool stored), void *arg);

/* tier.c: pages that are in a tier. The first four inside an operation. */
int tier_get(struct tm_ctx *ctx, slot_t *slot, uint64_t word, uint8_t *page); /* TM_OK, TM_AWAY, TM_CORRUPT */
const struct tm_block *tier_record(struct tm_ctx *ctx, slot_t *slot, uint64_t word, int *rc); /* sound, or NULL */
void tier_ahead(struct tm_ctx *ctx, const uint64_t oid[3], uint64_t index, uint64_t n, struct cursor *cur);
void tier_want(struct tm_ctx *ctx, uint64_t location); /* that the next fetch brings it, if there is room */
void tier_close(struct tm_ctx *ctx);  /* the window is not needed any more */
int tier_fetch(struct tm_ctx *ctx, uint32_t client); /* outside of operations, after one ended in TM_AWAY */
int tier_try(struct tm_ctx *ctx, uint32_t client); /* the same for nobody who waits: TM_DOWN after one try without an answer */
int tier_resume(const struct tm_handle *h, struct tm_ctx **ctx); /* end the operation, fetch, enter again */
uint32_t tier_stamp(const struct tm_segment *seg, uint64_t word); /* of the record of a slot with this generation */
struct tm_spill { /* a spill file, see backends/tiers/spill.py */
    int fd;
    uint64_t size; /* bytes */
};
int spill_open(const char *path, uint64_t nonce, uint32_t client, uint32_t serial, struct tm_spill *out); /* 0, -errno */
int spill_fetch(const struct tm_spill *spill, struct tm_window *w);

/* demote.c */
struct tm_candidate { /* a page that may leave memory, as it was seen */
    uint64_t slot, word;  /* the slot's number, and what was in it */
    uint32_t stamp, pool; /* of its block */
    uint32_t at, length;  /* of its record in the buffer */
    uint32_t epoch, zero; /* of the tier that it was collected for */
};
int64_t tm_collect(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t epoch, bool any, uint64_t *hand,
                   uint8_t *buffer, size_t size, struct tm_candidate *out, uint32_t most);
int64_t tm_demote(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const struct tm_candidate *pages,
                  const uint64_t *locations, uint32_t n);
struct leaf { /* of a client's persistent pools, met by a walk over all slots */
    uint32_t pool;
    uint64_t end; /* the first slot behind it */
};
/* The leaf in which slot `*at_slot` is, inside an operation; or false, and `*at_slot` is where to look next. */
bool leaf_at(struct tm_segment *seg, uint32_t id, uint64_t *at_slot, struct leaf *leaf);
uint64_t tm_live(struct tm_ctx *ctx, uint32_t id, uint64_t *out, uint64_t most); /* locations that slots name */
bool tier_grace(struct tm_ctx *ctx, uint32_t client, unsigned timeout_ms); /* who was fetching pages of that client is done */

/* promote.c: the other way, from slot `*hand` (0: the first) on, which is then 0 or where to go on */
/* Bring at most `most` pages back into memory. The number, or an error. */
int64_t tm_promote(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t *hand, uint32_t most);
/* Bring pages back as long as that leaves `keep` sixteenths of the memory and of the client's cap free, and disturbs nobody;
 * at most `most` or a few more, with `near` only those that lie beside pages that were read lately. The number, or an
 * error; in `*why` what ended it: TM_OK, TM_REFUSED (no room to spare), TM_DOWN or TM_CORRUPT. */
int64_t tm_prefetch(struct tm_ctx *ctx, uint32_t id, uint32_t serial, bool near, unsigned keep, uint64_t *hand,
                    uint32_t most, int *why);

/* device.c: bytes of a block device on one object; lengths need not be whole pages. TM_OK or an error. */
struct tm_device {
    struct tm_handle pool;
    uint8_t oid[TM_OID];
    uint64_t size;
};
int dev_read(const struct tm_device *d, uint8_t *data, uint64_t offset, uint64_t n);
/* Adds to `*done` the bytes that are stored: all, or up to what was refused or has to wait, where another try goes on. */
int dev_write(const struct tm_device *d, const uint8_t *data, uint64_t offset, uint64_t n, uint64_t *done);
int dev_zero(const struct tm_device *d, uint64_t offset, uint64_t n);

/* evict.c */
enum { SOFT = 8 }; /* drains on somebody's behalf that spare pages which were hit; beyond that they go too */
bool evict_chunk(struct tm_ctx *ctx, int client, bool hard); /* client -1: whose turn it is; false: none left */
uint32_t ephemeral_bin(struct tm_segment *seg, uint32_t account, unsigned queue, uint32_t length); /* of a page */
uint64_t tm_evict(struct tm_ctx *ctx, int client, uint64_t bytes, bool hard);
uint64_t block_spare(struct tm_ctx *ctx, uint32_t bin); /* as block_alloc for a pass in the background, in holes that it makes, too */
bool compact(struct tm_ctx *ctx); /* free a chunk by moving persistent pages; false: there is nothing to gain */
uint64_t tm_compact(struct tm_ctx *ctx, unsigned holes, uint64_t most_ns);
bool ghost_is_fresh(struct tm_segment *seg, uint32_t pool, uint64_t word); /* of an EMPTY slot; or it is GONE */

/* share.c: who gets how much */
uint32_t client_chunks(struct tm_segment *seg, uint32_t client); /* of its ephemeral pages */
int64_t client_bytes(struct tm_segment *seg, uint32_t client);   /* of all its pages */
int64_t client_ephemeral(struct tm_segment *seg, uint32_t client); /* pages */
int victim(struct tm_segment *seg, int asker);              /* the account to evict from for that client, -1 none */
int fullest_account(struct tm_segment *seg, uint32_t client);
uint32_t promised_chunks(struct tm_segment *seg, uint32_t asker); /* to other clients than that one */
bool has_cap_for(struct tm_segment *seg, uint32_t client, int64_t bytes); /* and may take so many more below its cap */
bool may_grow(struct tm_segment *seg, uint32_t client, int64_t bytes); /* no promise would be broken */
bool memory_is_plentiful(struct tm_segment *seg, uint32_t client); /* for it: pages may stay as they are */
bool memory_is_left(struct tm_segment *seg); /* an eighth, free or evictable, beyond all promises */
bool floors_fit(struct tm_segment *seg, uint32_t limit); /* under the chunk lock: could all floors be claimed now? */
uint64_t most_floor(struct tm_segment *seg, uint32_t client, uint32_t limit); /* likewise: of one, beside the others' */
uint32_t least_limit(struct tm_segment *seg); /* under the chunk lock: what persistent pages and floors need */
bool below_floor(struct tm_segment *seg, uint32_t client);

/* sizing.c: sizes in bytes, tables included */
int64_t hole_bytes(const struct tm_segment *seg); /* of blocks, in chunks of which others are in use */
void tm_size_within(struct tm_ctx *ctx, uint64_t least, uint64_t most);
uint64_t tm_limit(struct tm_ctx *ctx, uint64_t bytes, uint64_t persistent_bytes); /* the limit that is in force now */
uint64_t tm_shrink(struct tm_ctx *ctx, uint64_t keep_bytes, bool hard, uint64_t most_bytes); /* bytes given back */

/* timing.c */
void timing_begin(struct tm_ctx *ctx);
void timing_end(struct tm_ctx *ctx, unsigned kind, uint64_t n); /* n pages */
uint64_t timing_now(void);
uint64_t timing_cpu(void); /* of this thread, in ns */
static inline uint64_t time_after(uint64_t ns, uint64_t wait_ns) { return wait_ns > UINT64_MAX - ns ? UINT64_MAX : ns + wait_ns; }
void timing_add(struct tm_segment *seg, unsigned kind, uint64_t ns);
void timing_forget(struct tm_segment *seg, uint32_t client); /* the number is given to another one */
void most_update(struct tm_segment *seg);

/* client.c and pool.c; >= 0 or an error */
enum {
    TM_FULL = -6,      /* the table of clients, of a client's pools, of its authorisations, or of shared pools, is full */
    TM_DENIED = -9,    /* not authorised */
    TM_TAKEN = -10,    /* the name or number is in use, or the pool is shared already */
    TM_BUSY = -11,     /* a process is stopped in an operation, or another thread is at it */
    TM_WRONG = -12,    /* a step that does not follow */
    TM_TOO_MUCH = -13  /* so much cannot be promised */
};
int client_open(struct tm_ctx *ctx, const char *name, bool create, uint32_t *id, uint32_t *serial);
int client_stage(struct tm_ctx *ctx, const char *name, uint32_t *id, uint32_t *serial);
int client_commit(struct tm_ctx *ctx); /* the number shown */
int client_destroy(struct tm_ctx *ctx, uint32_t id, uint32_t serial);
int client_set_mode(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t mode);
int segment_set_mode(struct tm_ctx *ctx, uint32_t mode);
int client_set_floor(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t bytes);
int client_most_floor(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint64_t *bytes);
int client_authorise(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const uint8_t *uuid);
int client_revoke(struct tm_ctx *ctx, uint32_t id, uint32_t serial, const uint8_t *uuid); /* TM_MISS: was not */
enum client_value { VALUE_CAP, VALUE_WEIGHT, VALUE_CODEC, VALUE_DEDUP };
bool client_set(struct tm_ctx *ctx, uint32_t id, uint32_t serial, enum client_value which, uint64_t value);
int client_set_tiered(struct tm_ctx *ctx, uint32_t id, uint32_t serial, bool on); /* off: nothing is demoted any more */
int client_hold(struct tm_ctx *ctx, uint32_t id, uint32_t serial);
int client_handoff(struct tm_ctx *ctx, uint32_t id, uint32_t serial, uint32_t phase);
void client_help_copier(struct tm_segment *seg, uint32_t id); /* for whom its being frozen keeps waiting; outside operations */
struct pool_wish {
    bool persistent, exclusive;
    const uint8_t *uuid; /* NULL: private */
    int id;              /* -1: any */
};
void pool_new_originals(struct tm_ctx *ctx, uint32_t shared); /* of a shared pool, if it lives and has none */
int pool_new(struct tm_ctx *ctx, uint32_t client, uint32_t client_serial, const struct pool_wish *wish, uint32_t *pool,
             uint32_t *serial);
int pool_destroy(struct tm_ctx *ctx, uint32_t pool, uint32_t serial);
void pool_finish_dying(struct tm_ctx *ctx); /* what a dead destroyer left */
bool client_lives(struct tm_segment *seg, uint32_t id, uint32_t serial); /* or is staged */
struct tm_lock *control_lock(struct tm_segment *seg); /* taken, and the tables repaired if its holder died */
struct tm_lock *control_of(struct tm_segment *seg, uint32_t id, uint32_t serial); /* NULL: not that client any more */
/* Under the control lock: */
void client_show_staged(struct tm_segment *seg, uint32_t index);
void client_note_held(struct tm_segment *seg, uint32_t id, uint32_t but);
void client_store_floor(struct tm_segment *seg, uint32_t id, uint64_t bytes);
bool client_authorised(const struct tm_client *c, const uint8_t *uuid);
uint32_t pool_membership(struct tm_segment *seg, uint32_t client, const uint8_t *uuid);
static inline uint64_t client_bit(uint32_t client) { return UINT64_C(1) << client; }

/* check.c: calls `say` with one line per violation */
void tm_check(struct tm_ctx *ctx, void (*say)(void *arg, const char *line), void *arg);

/* ---- Small helpers ---------------------------------------------------------------------------------------- */

static inline void *at(const struct tm_segment *seg, uint64_t offset) { return seg->base + offset; }
static inline uint64_t off(const struct tm_segment *seg, const volatile void *p)
{
    return (uint64_t)((const volatile uint8_t *)p - seg->base);
}
static inline struct tm_block *block_at(const struct tm_segment *seg, uint64_t block)
{
    return at(seg, block * 16u);
}
static inline void *meta_at(const struct tm_segment *seg, uint32_t ref) { return at(seg, (uint64_t)ref * 128u); }
/* As headers of blocks, and twins, name a slot. */
static inline uint64_t slot_number(const struct tm_segment *seg, const slot_t *slot) { return off(seg, slot) / 8; }
static inline uint32_t chunk_of(const struct tm_segment *seg, uint64_t offset)
{
    return (uint32_t)((offset - seg->data_offset) / TM_CHUNK);
}
/* What a block takes. */
static inline uint32_t stride_at(const struct tm_segment *seg, uint64_t block)
{
    return bin_stride(seg->chunks[chunk_of(seg, block * 16)].bin);
}
/* The bound of now, in chunks: what everybody may use, or what persistent pages may when nothing can be evicted. */
static inline uint32_t chunk_limit(const struct tm_segment *seg, bool persistent)
{
    uint32_t limit = atomic_load_explicit(&seg->super->limit, memory_order_relaxed);
    uint32_t farther = persistent ? atomic_load_explicit(&seg->super->persistent_limit, memory_order_relaxed) : 0;
    limit = limit > farther ? limit : farther; /* who moved them may have died in between */
    return limit < seg->nchunks ? limit : seg->nchunks;
}
static inline uint64_t limit_bytes(const struct tm_segment *seg, uint32_t limit)
{
    return limit == seg->nchunks ? seg->super->memory_bytes : seg->data_offset + (uint64_t)limit * TM_CHUNK;
}
static inline bool in_data(const struct tm_segment *seg, uint64_t offset)
{
    return offset >= seg->data_offset && offset < seg->size;
}
static inline bool bin_is_block(uint32_t bin)
{
    return bin < BIN_OBJECT || (bin >= BIN_EPHEMERAL && bin < BIN_LEAF);
}
static inline bool bin_is_ephemeral(uint32_t bin) { return bin >= BIN_EPHEMERAL && bin < BIN_LEAF; }
static inline uint32_t bin_class(uint32_t bin) /* of blocks */
{
    return bin_is_ephemeral(bin) ? (bin - BIN_EPHEMERAL) % TM_NCLASSES : bin - BIN_PERSISTENT;
}
static inline uint32_t bin_account(uint32_t bin) { return (bin - BIN_EPHEMERAL) / (2u * TM_NCLASSES); }
static inline unsigned bin_queue(uint32_t bin) { return ((bin - BIN_EPHEMERAL) / TM_NCLASSES) & 1u; }
static inline uint32_t bin_ephemeral(uint32_t account, unsigned queue, uint32_t cls)
{
    return BIN_EPHEMERAL + (account * 2u + queue) * TM_NCLASSES + cls;
}
static inline uint32_t account_of(uint32_t pool)
{
    return pool < TM_FIRST_SHARED ? pool / TM_CLIENT_POOLS : TM_MAX_CLIENTS + (pool - TM_FIRST_SHARED) % TM_MAX_SHARED;
}
/* The client that pays for the pages of a pool. */
static inline uint32_t payer_of(const struct tm_segment *seg, uint32_t pool)
{
    if (pool < TM_FIRST_SHARED)
        return pool / TM_CLIENT_POOLS;
    if (pool >= TM_FIRST_SHARED_ORIGINALS)
        pool -= TM_MAX_SHARED;
    return atomic_load_explicit(&seg->pools[pool].owner, memory_order_relaxed);
}
static inline uint32_t mode_of(const struct tm_segment *seg, uint32_t client)
{
    uint32_t all = atomic_load_explicit(&seg->super->mode, memory_order_relaxed);
    uint32_t own = atomic_load_explicit(&seg->clients[client].mode, memory_order_relaxed);
    return own > all ? own : all;
}
static inline uint32_t phase_of(const struct tm_segment *seg, uint32_t client)
{
    return atomic_load_explicit(&seg->clients[client].phase, memory_order_relaxed);
}
/* The page whose block this is was wanted. */
static inline void note_touched(struct tm_segment *seg, uint64_t block)
{
    uint64_t within = block * 16 - seg->data_offset, bit = UINT64_C(1) << (within % TM_CHUNK / 1024);
    _Atomic uint64_t *mask = &seg->touched[within / TM_CHUNK].now;
    if (!(atomic_load_explicit(mask, memory_order_relaxed) & bit))
        atomic_fetch_or_explicit(mask, bit, memory_order_relaxed);
}
/* Are uses of the client's persistent pages noted in their slots? In this order: a handoff that finds the client
 * without a tier does not wait for operations that might note one. */
static inline bool notes_use(const struct tm_segment *seg, uint32_t client)
{
    return atomic_load_explicit(&seg->clients[client].tiered, memory_order_acquire) && !phase_of(seg, client);
}
static inline uint32_t size_class(uint32_t length) { return tm_classes[(length + TM_HEADER + 15) / 16]; }
static inline void look_for_empty(struct tm_segment *seg)
{
    if (!atomic_load_explicit(&seg->super->look, memory_order_relaxed))
        atomic_store_explicit(&seg->super->look, 1, memory_order_relaxed);
}
static inline void note_orphans(struct tm_segment *seg, uint32_t which)
{
    if (!(atomic_load_explicit(&seg->super->orphans, memory_order_relaxed) & which))
        atomic_fetch_or(&seg->super->orphans, which);
}
static inline void note_death(struct tm_segment *seg)
{
    note_orphans(seg, ORPHAN_ORIGINALS | ORPHAN_PACKS); /* what a dead one made may have no name yet */
    atomic_fetch_add(&seg->super->deaths, 1);
    atomic_store(&seg->super->recount, 1);
}
static inline void count(struct tm_segment *seg, uint32_t pool, unsigned counter, uint64_t n)
{
    atomic_fetch_add_explicit(&seg->pools[pool].counters[counter], n, memory_order_relaxed);
}

/* The mark of who fetches: below its highest byte a count that is odd meanwhile, and in that the client whose pages these are,
 * plus 1. 0 there is anybody's, and what a process of an earlier version has: everybody waits for it. */
#define FETCHING_WHOSE 56u
static inline void fetching_begin(struct tm_thread *rec, uint32_t client)
{
    uint64_t count = atomic_load_explicit(&rec->fetching, memory_order_relaxed) & ((UINT64_C(1) << FETCHING_WHOSE) - 1);
    uint64_t whose = client < TM_MAX_CLIENTS ? client + 1 : 0;
    atomic_exchange(&rec->fetching, (count + 1) | whose << FETCHING_WHOSE); /* in one step: nobody may see it as another's */
}
static inline void fetching_end(struct tm_thread *rec)
{
    uint64_t count = atomic_load_explicit(&rec->fetching, memory_order_relaxed) & ((UINT64_C(1) << FETCHING_WHOSE) - 1);
    atomic_store_explicit(&rec->fetching, count + (count & 1), memory_order_release);
}

/* Behind a change of the sums, inside the operation that made it. */
static inline void note_change(struct tm_ctx *ctx)
{
    _Atomic uint64_t *changes = &ctx->rec->changes;
    atomic_store_explicit(changes, atomic_load_explicit(changes, memory_order_relaxed) + 1, memory_order_release);
}

/* Kill points: named instants between stores that matter. Nothing in the product's build. */
#ifdef TM_KILL_POINTS
void kill_point(int n);
#define KP(n) kill_point(n)
#else
#define KP(n) ((void)0)
#endif
/* Mutants: deliberate bugs that the crash test must catch. Nothing in the product's build. */
#ifdef TM_KILL_POINTS
extern int tm_mutant; /* which, 0 none; tests/native/mutant.c */
#define MUTANT(n) (tm_mutant == (n))
#else
#define MUTANT(n) 0
#endif

#endif
