#include "reader_ahead.h"

#include "tm.h"

#include <sys/mman.h>

enum {
    HUGE_BYTES = 2 << 20,    /* a huge page, in which both windows of 1 MiB fit */
    SMALL_BYTES = 64 << 10, /* up to which a window is not worth one, which is in memory as a whole: such replies do not go by a pipe */
    LEAST_AHEAD = 32 << 10,  /* bytes: what is smaller is fetched sooner than another thread runs */
    LEAST_HELPED = 256 << 10, /* to wake a thread costs as much as a piece of it (128 KiB: no gain, 1.7 times the CPU time) */
};

void ahead_init(struct ahead *a, struct hits *h) { window_init(&a->window, h); }

static void unmap(struct room *room)
{
    if (room->memory)
        munmap(room->memory, room->bytes);
    *room = (struct room){0};
}

void ahead_free(struct ahead *a)
{
    window_free(&a->window);
    unmap(&a->small);
    unmap(&a->large);
}

static uint8_t *map(size_t bytes)
{
    uint8_t *all = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return all == MAP_FAILED ? NULL : all;
}

/* In huge pages if the kernel has any: it looks each page of a reply up, which is done sooner there, and all have one descriptor
 * (3 to 7 % of the time from one request of 1 MiB to the next). */
static void map_large(struct room *room, size_t largest)
{
    size_t bytes = (2 * largest + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    uint8_t *all = map(bytes + HUGE_BYTES);
    if (!all)
        return;
    size_t before = (HUGE_BYTES - (uintptr_t)all % HUGE_BYTES) % HUGE_BYTES;
    before += MUTANT(70) ? TM_PAGE : 0;
    if (before)
        munmap(all, before);
    munmap(all + before + bytes, HUGE_BYTES - before);
    *room = (struct room){.memory = all + before, .bytes = bytes};
    if (!MUTANT(72))
        (void)madvise(room->memory, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes; i += HUGE_BYTES) /* to find one may take the kernel long: not within an operation of the pool */
        *(volatile uint8_t *)(room->memory + i) = 0;
}

/* Memory for windows of this size; NULL: there is none. */
static struct room *room_for(struct ahead *a, size_t size, size_t largest)
{
    bool small = size <= SMALL_BYTES && !MUTANT(93);
    struct room *room = small ? &a->small : &a->large;
    if (!room->memory && small)
        *room = (struct room){.memory = map(2 * SMALL_BYTES), .bytes = 2 * SMALL_BYTES};
    else if (!room->memory)
        map_large(room, largest);
    room->lately = room->memory;
    return room->memory ? room : NULL;
}

static void rest(struct ahead *a, struct room *room, bool all)
{
    bool keep = !room->memory || (room->lately && !all);
    uintptr_t at = (uintptr_t)a->window.data, from = (uintptr_t)room->memory;
    room->lately = false;
    if (keep || MUTANT(91))
        return;
    if (at >= from && at < from + room->bytes) {
        if (!window_end(&a->window) && !MUTANT(92))
            return;
        a->length = 0;
        a->window.data = NULL;
    }
    unmap(room);
}

void ahead_rest(struct ahead *a, bool all)
{
    rest(a, &a->small, all);
    rest(a, &a->large, all);
}

bool ahead_has(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, struct answer *out)
{
    if (!a->length || read_in->fh != a->fh || read_in->offset != a->offset || read_in->size != a->length)
        return false;
    size_t length = a->length;
    a->length = 0;
    window_fetch(&a->window);
    if (!window_whole(&a->window) || !hits_hold(h, read_in, a->window.target.turn))
        return false;
    *out = (struct answer){.bytes = a->window.data, .length = length};
    return true;
}

bool ahead_expects(struct ahead *a, const struct fuse_read_in *read_in)
{
    bool follows = read_in->fh == a->last_fh && read_in->offset == a->last_end;
    a->last_fh = read_in->fh;
    a->last_end = read_in->offset + read_in->size;
    if (!follows)
        a->judged_ns = 0;
    return follows && read_in->size >= LEAST_AHEAD && read_in->offset % TM_PAGE == 0 && read_in->size % TM_PAGE == 0;
}

/* Whether the second thread is to fetch the window after a READ of so many bytes. */
static bool is_helped(struct ahead *a, uint32_t bytes)
{
    uint64_t now_ns = timing_now(), before_ns = a->judged_ns;
    a->judged_ns = now_ns;
    if (before_ns)
        judge_took(&a->judge, now_ns - before_ns, bytes);
    return judge_next(&a->judge);
}

void ahead_begin(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, bool may_help)
{
    uint64_t offset = read_in->offset + read_in->size;
    struct target target;
    a->length = 0;
    bool may = window_end(&a->window) && hits_expect(h, read_in->fh, offset, read_in->size, &target);
    bool judges = may && may_help && read_in->size >= LEAST_HELPED;
    bool helped = judges && is_helped(a, read_in->size);
    if (!judges)
        a->judged_ns = 0;
    if (!may)
        return;
    a->used ^= helped; /* the last one is being sent */
    struct room *room = room_for(a, read_in->size, h->largest);
    if (!room)
        return;
    uint8_t *data = room->memory + (MUTANT(71) ? 0 : a->used * (room->bytes / 2));
    window_begin(&a->window, &target, (uint32_t)(offset / TM_PAGE), read_in->size / TM_PAGE, data);
    if (helped)
        window_lend(&a->window);
    a->fh = read_in->fh;
    a->offset = offset;
    a->length = read_in->size;
}

void ahead_fetch(struct ahead *a, bool later)
{
    if (a->length && !later)
        window_fetch(&a->window);
    else
        window_take_back(&a->window);
}
