#include "reader_ahead.h"

enum { LEAST_AHEAD = 32 << 10 }; /* bytes: what is smaller is fetched sooner than another thread runs */

bool ahead_has(struct ahead *a, struct hits *h, const struct fuse_read_in *read_in, struct answer *out)
{
    if (!a->length || read_in->fh != a->fh || read_in->offset != a->offset || read_in->size != a->length)
        return false;
    size_t length = a->length;
    a->length = 0;
    if (!hits_hold(h, read_in, a->turn))
        return false;
    *out = (struct answer){.bytes = a->buffer->data, .length = length};
    return true;
}

bool ahead_expects(struct ahead *a, const struct fuse_read_in *read_in)
{
    bool follows = read_in->fh == a->last_fh && read_in->offset == a->last_end;
    a->last_fh = read_in->fh;
    a->last_end = read_in->offset + read_in->size;
    return follows && read_in->size >= LEAST_AHEAD && read_in->offset % TM_PAGE == 0 && read_in->size % TM_PAGE == 0;
}

void ahead_fetch(struct ahead *a, struct hits *h, struct buffers *buffers, const struct fuse_read_in *read_in)
{
    uint64_t offset = read_in->offset + read_in->size;
    a->length = 0;
    if (!a->buffer && !(a->buffer = buffer_take(buffers, 0)))
        return;
    if (hits_expect(h, read_in->fh, offset, read_in->size, a->buffer->data, &a->turn)) {
        a->fh = read_in->fh;
        a->offset = offset;
        a->length = read_in->size;
    }
}

void ahead_clear(struct ahead *a)
{
    if (a->buffer)
        buffer_drop(a->buffer);
    a->buffer = NULL;
    a->length = 0;
}
