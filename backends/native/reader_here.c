/* What the event loop's thread answers by itself of the requests that Python answers else: the usual OPEN, and the RELEASE of what
 * was opened so (reader_opens.h). See reader_inside.h. */
#include "reader_inside.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ASKED_TOGETHER = 16 }; /* others bring more meanwhile, and Python and its requests want their turn: some 0.3 ms */

static void answer(struct reader *r, uint64_t unique, bool held, const void *bytes, size_t length)
{
    if (held)
        (void)passing_reply(&r->passing, unique, 0, bytes, length);
    else
        reply_bytes(&r->passing, NULL, unique, bytes, length);
}

/* Away from requests while the lower may keep it waiting. */
static bool open_here(struct reader *r, const struct fuse_in_header *in, size_t length, bool held)
{
    struct nodes *nodes = atomic_load_explicit(&r->answering, memory_order_acquire);
    struct fuse_open_in open_in;
    struct fuse_open_out out;
    bool doubt = false;
    if (!nodes || length < sizeof *in + sizeof open_in)
        return false;
    memcpy(&open_in, in + 1, sizeof open_in);
    int node = opens_may(r->opens, in->nodeid, open_in.flags) ? nodes_shown(nodes, in->nodeid) : -1;
    if (node < 0)
        return false;
    reader_leave(r);
    bool done = opens_open(r->opens, &r->hits, in, node, &out, &doubt);
    reader_return(r);
    if (!done)
        return false;
    nodes_find(nodes, in->nodeid)->unlearned++;
    if (doubt)
        tell_doubt(&r->passing, in->nodeid);
    answer(r, in->unique, held, &out, sizeof out);
    atomic_fetch_add_explicit(&r->nopens, 1, memory_order_relaxed);
    return true;
}

static bool close_here(struct reader *r, const struct fuse_in_header *in, size_t length, bool held)
{
    struct fuse_release_in release;
    struct stat st;
    if (length < sizeof *in + sizeof release)
        return false;
    memcpy(&release, in + 1, sizeof release);
    int fd = opens_find(r->opens, release.fh);
    /* A file without a name loses its pages with its last close. */
    if (fd < 0 || fstat(fd, &st) || !st.st_nlink || !passing_may_close(&r->passing))
        return false;
    opens_closed(r->opens, release.fh);
    struct node *one = nodes_find(atomic_load(&r->nodes), in->nodeid);
    if (one && one->unlearned)
        one->unlearned--;
    if (!files_remove(&r->hits.files, release.fh))
        close(fd);
    answer(r, in->unique, held, NULL, 0);
    atomic_fetch_add_explicit(&r->ncloses, 1, memory_order_relaxed);
    return true;
}

bool reader_open_here(struct reader *r, const struct fuse_in_header *in, size_t length, bool held)
{
    if (!r->opens)
        return false;
    return in->opcode == FUSE_OPEN ? open_here(r, in, length, held)
                                   : in->opcode == FUSE_RELEASE && close_here(r, in, length, held);
}

bool reader_asks(struct reader *r, unsigned *answered)
{
    struct fuse_in_header in;
    struct asked *a;
    for (unsigned n = 0; n < ASKED_TOGETHER && (a = shortcut_first(&r->shortcut)); n++, ++*answered) {
        memcpy(&in, a->bytes, sizeof in);
        if (passing_wants_held(&r->passing, in.unique)) { /* a FORGET is no flight */
            if (a->tried || !reader_open_here(r, (const void *)a->bytes, a->length, true)) {
                a->tried = true;
                return true;
            }
        }
        free(shortcut_take(&r->shortcut));
    }
    return false;
}

/* Outside reader_serve: what were opened here would not be learned before the next request, which may be for the same file. */
struct asked *reader_asked(struct reader *r)
{
    struct fuse_in_header in;
    struct asked *a;
    while ((a = shortcut_take(&r->shortcut))) {
        memcpy(&in, a->bytes, sizeof in);
        if (passing_wants_held(&r->passing, in.unique))
            break;
        free(a);
    }
    return a;
}
