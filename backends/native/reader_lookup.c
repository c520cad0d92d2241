/* LOOKUP and FORGET below Python: the table of nodes has all that they take. See reader.h. */
#include "reader_inside.h"

#include <errno.h>

/* An errno, or 0 and what the kernel is told. EAGAIN: it would have to wait, and may not. `local`: the root's device; of a name elsewhere
 * that is at hand the attributes may not be, and there is no way to see that, so threads have to look at it first in any case. */
static int look_up(struct nodes *n, uint64_t parent, const char *name, bool may_wait, bool local, struct fuse_entry_out *out)
{
    struct lifetimes lifetimes;
    struct stat st;
    struct node *directory = nodes_find(n, parent), *one;
    if (!directory)
        return ESTALE;
    if (!may_wait && !nodes_is_here(n, directory->device, local))
        return EAGAIN;
    int at = nodes_descriptor(n, directory);
    if (at < 0)
        return errno;
    int fd = look_up_name(nodes_patience(n), at, name, may_wait, &st);
    int error = fd < 0 ? errno : 0;
    nodes_lifetimes(n, &lifetimes);
    if (error == ENOENT && lifetimes.absent > 0 && directory->device == lifetimes.device) {
        put_absent(&lifetimes, out);
        return 0;
    }
    if (error)
        return error;
    struct node found = {.device = st.st_dev, .number = st.st_ino, .kind = st.st_mode & S_IFMT, .fd = fd};
    if (!(one = nodes_meet(n, &found, (double)timing_now() / 1e9, true)))
        return ENOMEM;
    one->lookups++;
    (void)put_looked_up(&lifetimes, &st, out);
    out->nodeid = out->attr.ino = one->nodeid;
    out->generation = one->generation;
    if (one->stored_to)
        out->attr_valid = out->attr_valid_nsec = 0;
    nodes_tell_time(n, one, &out->attr, &out->attr_valid, &out->attr_valid_nsec);
    return 0;
}

bool reader_look_up(struct reader *r, uint64_t unique, uint64_t parent, const char *name, bool may_wait)
{
    struct fuse_entry_out out = {0};
    struct nodes *nodes = atomic_load(&r->nodes);
    if (!nodes)
        return false;
    int error = look_up(nodes, parent, name, may_wait, atomic_load(&r->answering), &out);
    if (error == EAGAIN && !may_wait)
        return false;
    (void)passing_reply(&r->passing, unique, error, &out, error ? 0 : sizeof out);
    return true;
}

bool reader_take_back(struct reader *r, uint64_t nodeid, uint64_t count)
{
    struct nodes *nodes = atomic_load(&r->nodes);
    return nodes && nodes_take_back(nodes, nodeid, count);
}
