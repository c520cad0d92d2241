#include "reader_ahead.h"

enum {
    LEAST_AHEAD = 32 << 10,  /* bytes: what is smaller is fetched sooner than another thread runs */
    LEAST_HELPED = 256 << 10, /* to wake a thread costs as much as a piece of it (128 KiB: no gain, 1.7 times the CPU time) */
};

void ahead_init(struct ahead *a, struct hits *h) { window_init(&a->window, h); }

void ahead_free(struct ahead *a)
{
    window_free(&a->window);
    for (unsigned i = 0; i < 2; i++)
        if (a->buffers[i])
            buffer_drop(a->buffers[i]);
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
    *out = (struct answer){.bytes = a->buffers[a->used]->data, .length = length};
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

void ahead_begin(struct ahead *a, struct hits *h, struct buffers *buffers, const struct fuse_read_in *read_in, bool may_help)
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
    struct buffer **buffer = &a->buffers[a->used];
    if (!*buffer && !(*buffer = buffer_take(buffers, 0)))
        return;
    window_begin(&a->window, &target, (uint32_t)(offset / TM_PAGE), read_in->size / TM_PAGE, (*buffer)->data);
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
