/* What the event loop's thread answers by itself of the requests that Python answers else: the usual OPEN, and the RELEASE of what
 * was opened so (reader_opens.h). See reader_inside.h. */
#include "reader_inside.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ASKED_TOGETHER = 16 }; /* others bring more meanwhile, and Python and its requests want their turn: some 0.3 ms */

/* The descriptor of the node to open, -1: it is for Python. */
static int node_to_open(struct reader *r, const struct fuse_in_header *in, size_t length)
{
    const struct nodes *nodes = atomic_load_explicit(&r->answering, memory_order_acquire);
    struct fuse_open_in open_in;
    if (!r->opens || !nodes || in->opcode != FUSE_OPEN || length < sizeof *in + sizeof open_in)
        return -1;
    memcpy(&open_in, in + 1, sizeof open_in);
    return opens_may(r->opens, in->nodeid, open_in.flags) ? nodes_shown(nodes, in->nodeid) : -1;
}

bool reader_may_open(struct reader *r, const struct fuse_in_header *in, size_t length) { return node_to_open(r, in, length) >= 0; }

/* Away from requests while the lower may keep it waiting. */
bool reader_open_here(struct reader *r, const struct fuse_in_header *in, size_t length)
{
    int node = node_to_open(r, in, length);
    struct fuse_open_out out;
    bool doubt = false;
    if (node < 0)
        return false;
    reader_leave(r);
    bool done = opens_open(r->opens, &r->hits, in, node, &out, &doubt);
    reader_return(r);
    if (!done)
        return false;
    nodes_find(atomic_load(&r->nodes), in->nodeid)->unlearned++;
    if (doubt)
        tell_doubt(&r->passing, in->nodeid);
    (void)passing_reply(&r->passing, in->unique, 0, &out, sizeof out); /* nobody has to hear it: no pages are to be dropped */
    atomic_fetch_add_explicit(&r->nopens, 1, memory_order_relaxed);
    return true;
}

bool reader_close_here(struct reader *r, const struct fuse_in_header *in, size_t length, bool held)
{
    struct fuse_release_in release;
    struct stat st;
    if (!r->opens || in->opcode != FUSE_RELEASE || length < sizeof *in + sizeof release)
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
    if (held)
        (void)passing_reply(&r->passing, in->unique, 0, NULL, 0);
    else
        reply_bytes(&r->passing, NULL, in->unique, NULL, 0);
    atomic_fetch_add_explicit(&r->ncloses, 1, memory_order_relaxed);
    return true;
}

/* An OPEN that Python has begun, and ends: what was opened is closed by a RELEASE, for which it needs a handle. */
static bool is_begun(const struct asked *a)
{
    return a->opened && ((const struct fuse_in_header *)(const void *)a->bytes)->opcode == FUSE_OPEN;
}

static bool is_wanted(struct reader *r, const struct asked *a)
{
    return is_begun(a) || passing_wants_held(&r->passing, ((const struct fuse_in_header *)(const void *)a->bytes)->unique);
}

static bool is_done_here(struct reader *r, const struct asked *a)
{
    const struct fuse_in_header *in = (const void *)a->bytes;
    return !a->tried && !is_begun(a) && (reader_open_here(r, in, a->length) || reader_close_here(r, in, a->length, true));
}

/* Answer the oldest if it is one that needs no Python at all. `serves`: within reader_serve, and away from requests meanwhile. */
static bool list_first(struct reader *r, bool serves)
{
    struct asked *a = shortcut_first(&r->shortcut);
    const struct fuse_in_header *in = (const void *)a->bytes;
    if (!reader_lists(r, in, a->length))
        return false;
    if (serves)
        reader_leave(r);
    reader_list_here(r, in, a->length, shortcut_take(&r->shortcut));
    if (serves)
        reader_return(r);
    return true;
}

bool reader_asks(struct reader *r, unsigned *answered)
{
    struct asked *a;
    for (unsigned n = 0; n < ASKED_TOGETHER && (a = shortcut_first(&r->shortcut)); n++, ++*answered) {
        if (is_wanted(r, a)) { /* a FORGET is no flight */
            if (list_first(r, true))
                continue;
            if (!is_done_here(r, a)) {
                a->tried = true;
                return true;
            }
        }
        asked_free(shortcut_take(&r->shortcut));
    }
    return false;
}

/* Outside reader_serve: what were opened here would not be learned before the next request, which may be for the same file. */
struct asked *reader_asked(struct reader *r)
{
    struct asked *a;
    for (unsigned n = 0; n < ASKED_TOGETHER && (a = shortcut_first(&r->shortcut)); n++) {
        bool wanted = is_wanted(r, a);
        if (wanted && list_first(r, false))
            continue;
        a = shortcut_take(&r->shortcut);
        if (wanted)
            return a;
        asked_free(a);
    }
    return NULL;
}
