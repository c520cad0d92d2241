/* OPENDIR, READDIRPLUS and RELEASEDIR below Python: the tables of nodes and of listings have all that they take.
 *
 * What may take longer than others can wait is left to threads (`reader_onlookers.h`), and the request asked once more then: to
 * open a directory of a lower that is elsewhere, to read one, and names. See reader_inside.h. */
#include "reader_inside.h"

#include <errno.h>
#include <linux/fuse.h>
#include <string.h>
#include <unistd.h>

enum {
    TRIES = 3,       /* after so many a listing waits for names itself: what was fetched may be gone again, but not for ever */
    FETCHED = 64,    /* names at a time; a page of the kernel's usual size has room for some 25 */
};

bool reader_lists(struct reader *r, const struct fuse_in_header *in, size_t length)
{
    bool lists = in->opcode == FUSE_OPENDIR || in->opcode == FUSE_READDIRPLUS || in->opcode == FUSE_RELEASEDIR;
    return lists && r->listings && shortcut_takes(&r->shortcut, in, length);
}

/* A request in hand. */
struct question {
    struct reader *r;
    const struct fuse_in_header *in;
    size_t length;
    struct asked *asked; /* where it was put by; NULL: it was not, or is not ours any more */
    bool begun;          /* its listing has */
    uint64_t looked;     /* so far threads are to look at names */
};

static bool was_fetched(const struct question *q) { return q->asked && q->asked->fetched; }

/* Have threads do this first; false: there are none. */
static bool leave_to_threads(struct question *q, enum work work, int directory, uint64_t from, const char *const *names,
                             unsigned n)
{
    struct asked *a = q->asked ? q->asked : asked_new(q->in, q->length, true);
    if (!a)
        return false;
    a->begun = q->begun;
    a->from = from;
    a->looked = q->looked;
    if (onlookers_start(&q->r->onlookers, atomic_load(&q->r->nodes), work, directory, names, n, a)) {
        q->asked = NULL;
        return true;
    }
    if (!q->asked)
        asked_free(a);
    return false;
}

static bool is_local(struct reader *r) { return atomic_load_explicit(&r->answering, memory_order_acquire) != NULL; }

/* ---- Opening ----------------------------------------------------------------------------------------------- */

/* A descriptor and what stat says of it; -1: *error, or 0 if threads are to do it. */
static int open_directory(struct question *q, struct stat *st, int *error)
{
    uint64_t device;
    struct asked *a = q->asked;
    *error = 0;
    if (a && a->opened) {
        int fd = a->fd;
        a->fd = -1;
        *st = a->st;
        *error = a->error;
        return fd;
    }
    int way = listings_way(q->r->listings, q->in->nodeid, &device);
    if (way >= 0 && !was_fetched(q) && listings_wait(q->r->listings, device, is_local(q->r), false)
        && leave_to_threads(q, OPEN_DIRECTORY, way, 0, NULL, 0))
        return -1;
    int fd = way < 0 ? -1 : listing_open_at(way, st);
    *error = fd < 0 ? errno : 0;
    return fd;
}

static void opendir_here(struct question *q)
{
    struct stat st;
    struct fuse_open_out out = {0};
    int error, fd = open_directory(q, &st, &error);
    if (fd < 0 && !error)
        return;
    struct listing *one = fd < 0 ? NULL : listings_add(q->r->listings, q->in->nodeid, fd, &st);
    if (one) {
        out.fh = one->fh;
        out.open_flags = listings_flags(q->r->listings, one);
    } else if (fd >= 0) {
        error = errno;
        close(fd);
    }
    (void)passing_reply(&q->r->passing, q->in->unique, error, &out, error ? 0 : sizeof out);
}

/* ---- Listing ----------------------------------------------------------------------------------------------- */

/* Begin a listing, or one that the kernel has lost at `number`, with this content; NULL: read it here. An errno. */
static int begin_with(struct reader *r, struct listing *one, uint64_t number, struct names *content)
{
    if (!content) {
        content = names_read(one->fd, one->was_read, listings_from(r->listings, one, number));
        one->was_read = true;
    }
    if (!content)
        return ENOMEM;
    ends_note(&r->ends, one->fh, 0);
    listings_begin(r->listings, one, content, number);
    return 0;
}

/* The same. False: threads are to read the directory. */
static bool begin(struct question *q, struct listing *one, uint64_t number, int *error)
{
    struct reader *r = q->r;
    struct names *content = q->asked ? q->asked->content : NULL;
    if (content)
        q->asked->content = NULL;
    else if (!was_fetched(q) && listings_wait(r->listings, one->device, is_local(r), true)
             && leave_to_threads(q, READ_DIRECTORY, one->fd, listings_from(r->listings, one, number), NULL, 0))
        return false;
    *error = begin_with(r, one, number, content);
    q->begun = true;
    return true;
}

static bool fetch_names(struct question *q, const struct listing *one, uint64_t number)
{
    const char *names[FETCHED];
    const struct name *first;
    size_t left = listings_left(one, number, &first);
    unsigned n = 0;
    for (; n < FETCHED && n < left; n++)
        names[n] = first[n].bytes;
    q->looked = number + n;
    return leave_to_threads(q, LOOK_AT_NAMES, one->fd, 0, names, n);
}

/* Have the reply to a READDIRPLUS be a page; an errno. `later`: threads are to fetch names first; NULL: wait for all. Names that
 * would have to be waited for are left for the next page. If even the first one would, they are fetched. */
static int put_page(struct question *q, struct listing *one, uint64_t unique, bool *later)
{
    struct reader *r = q->r;
    struct nodes *nodes = atomic_load(&r->nodes);
    uint64_t number;
    uint32_t size;
    if (!passing_asks_for(&r->passing, unique, &number, &size))
        return EIO;
    struct buffer *b = buffer_take(r->buffers, sizeof(struct fuse_out_header) + size);
    if (!b)
        return ENOMEM;
    struct page p;
    page_begin(&p, b, size, nodes, listings_lifetime(r->listings, one));
    p.asks = !nodes_is_here(nodes, one->device, is_local(r));
    p.looked = q->asked ? q->asked->looked : 0;
    bool may_wait = !later || (q->asked && q->asked->fetched >= TRIES);
    int error = listings_fill(r->listings, one, &p, &number, may_wait);
    if (p.waits && !p.nfound) { /* what was found is told at once: later it might be wrong */
        if ((*later = fetch_names(q, one, number)))
            goto end;
        error = listings_fill(r->listings, one, &p, &number, true);
    }
    if (error)
        goto end;
    if (listings_reported(r->listings, one, &p, number)) /* every listing is asked for what comes after its end */
        ends_note(&r->ends, one->fh, number);
    if (p.length && !passing_list(&r->passing, unique, p.buffer, p.length))
        error = EIO;
end:
    page_end(&p);
    return error;
}

static void list_here(struct question *q)
{
    struct fuse_read_in read_in;
    bool later = false;
    int error = 0;
    memcpy(&read_in, q->in + 1, sizeof read_in);
    struct listing *one = listings_find(q->r->listings, read_in.fh);
    q->begun = one && (!listings_lacks(one, read_in.offset) || (q->asked && q->asked->begun));
    if (!one)
        error = EBADF;
    else if (!q->begun && !begin(q, one, read_in.offset, &error))
        return;
    if (!error)
        error = put_page(q, one, q->in->unique, &later);
    if (!later)
        (void)passing_reply(&q->r->passing, q->in->unique, error, NULL, 0);
}

int reader_list(struct reader *r, uint64_t number, uint64_t fh)
{
    struct listing *one = r->listings ? listings_find(r->listings, fh) : NULL;
    struct question q = {.r = r};
    uint64_t offset;
    uint32_t size;
    int error;
    if (!one)
        return EBADF;
    if (!passing_asks_for(&r->passing, number, &offset, &size))
        return EINVAL;
    if (listings_lacks(one, offset) && (error = begin_with(r, one, offset, NULL)))
        return error;
    return put_page(&q, one, number, NULL);
}

void reader_list_here(struct reader *r, const struct fuse_in_header *in, size_t length, struct asked *asked)
{
    struct question q = {r, in, length, asked, false, 0};
    struct fuse_release_in release;
    if (in->opcode == FUSE_OPENDIR) {
        opendir_here(&q);
    } else if (in->opcode == FUSE_READDIRPLUS) {
        list_here(&q);
    } else {
        memcpy(&release, in + 1, sizeof release);
        (void)passing_reply(&r->passing, in->unique, listings_close(r->listings, release.fh) ? 0 : EBADF, NULL, 0);
    }
    asked_free(q.asked);
}
