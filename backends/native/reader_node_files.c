#include "reader_nodes_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    MOST_LOOKS = 3,
    MOST_TRIES = 64, /* descriptors that are looked at to close some, so the cost stays bounded */
};

/* ---- Descriptors ------------------------------------------------------------------------------------------- */

/* Whether it can be opened again, and so be closed: it has a name, and a handle. */
static bool may_close(struct node *one)
{
    struct stat st;
    if (fstat(one->fd, &st) || !st.st_nlink)
        return false;
    if (!one->handle)
        one->handle = handle_at(one->fd, false);
    return one->handle;
}

/* Close the oldest: many at once, for looking at a large tree closes one for each name. */
static void retire(struct nodes *n, const struct node *newest)
{
    struct node *old[MOST_TRIES];
    size_t count = 0;
    pthread_mutex_lock(&n->lock);
    for (unsigned i = 0; i < MOST_TRIES && count < n->batch && n->oldest; i++) {
        struct node *one = n->oldest;
        nodes_take_from_open(n, one); /* whatever stays is the newest then */
        nodes_append_open(n, one);
        if (one != newest && !one->opens && !one->unlearned && one->device == n->device)
            old[count++] = one;
    }
    pthread_mutex_unlock(&n->lock);
    for (size_t i = 0; i < count; i++) {
        if (!may_close(old[i]))
            continue;
        pthread_mutex_lock(&n->lock); /* waits for who uses it */
        int fd = nodes_take_descriptor(n, old[i]);
        pthread_mutex_unlock(&n->lock);
        close(fd);
    }
}

void nodes_keep(struct nodes *n, struct node *one, int fd)
{
    pthread_mutex_lock(&n->lock);
    one->fd = fd;
    nodes_append_open(n, one);
    pthread_mutex_unlock(&n->lock);
    if (n->nopen > n->quota && n->by_handle)
        retire(n, one);
}

int nodes_descriptor(struct nodes *n, struct node *one)
{
    if (one->fd >= 0)
        return one->fd;
    int fd = -1;
    if (one->by_id && one->handle)
        fd = handle_open(n->root, one->handle);
    else
        errno = ESTALE;
    if (fd >= 0)
        nodes_keep(n, one, fd);
    return fd;
}

/* Of a file with the device of `one`. Those of FUSE tell files apart although nobody can open by them. (On overlayfs such ones
 * change.) */
struct handle *nodes_ask_handle(const struct nodes *n, const struct node *one, int fd)
{
    return handle_at(fd, n->is_fuse && one->device == n->device);
}

const struct handle *nodes_handle(struct nodes *n, struct node *one)
{
    int fd = one->handle ? -1 : nodes_descriptor(n, one);
    if (fd >= 0)
        one->handle = nodes_ask_handle(n, one, fd);
    return one->handle;
}

/* ---- Which file it is --------------------------------------------------------------------------------------- */

/* Whether two open files with one number are links to one file, as far as can be seen. To a FUSE file system each may be a node of
 * its own, of which the kernel remembers other attributes. */
static bool are_links(int one, int other)
{
    struct statx a, b;
    for (unsigned i = 0; i < MOST_LOOKS; i++) { /* it may be changing */
        int flags = AT_EMPTY_PATH | AT_STATX_FORCE_SYNC;
        if (statx(one, "", flags, STATX_BASIC_STATS, &a) || statx(other, "", flags, STATX_BASIC_STATS, &b))
            return false; /* one of them is gone */
        if (a.stx_nlink > 1 && !S_ISDIR(a.stx_mode) && a.stx_nlink == b.stx_nlink && a.stx_uid == b.stx_uid
            && a.stx_gid == b.stx_gid && a.stx_mode == b.stx_mode && a.stx_size == b.stx_size
            && a.stx_ctime.tv_sec == b.stx_ctime.tv_sec && a.stx_ctime.tv_nsec == b.stx_ctime.tv_nsec
            && a.stx_mtime.tv_sec == b.stx_mtime.tv_sec && a.stx_mtime.tv_nsec == b.stx_mtime.tv_nsec)
            return true;
    }
    return false;
}

bool nodes_numbers_tell(const struct nodes *n, uint64_t device) { return n->numbers_tell && device == n->device; }

struct node *nodes_known(struct nodes *n, const struct node *found)
{
    struct node *first = nodes_with(n, found->device, found->number), *one = NULL;
    if (nodes_numbers_tell(n, found->device) || (!first && !n->nbeside))
        return first;
    struct handle *h = nodes_ask_handle(n, found, found->fd);
    if (!h || (first && handle_equals(nodes_handle(n, first), h))) {
        free(h);
        return first;
    }
    for (one = nodes_first_with(n, found->device, found->number); one; one = one->next_by_key)
        if (one->beside && one->number == found->number && one->device == found->device && handle_equals(one->handle, h))
            break;
    free(h);
    int fd = !one && first ? nodes_descriptor(n, first) : -1;
    return fd >= 0 && are_links(fd, found->fd) ? first : one;
}
