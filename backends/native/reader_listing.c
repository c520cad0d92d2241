#include "reader_listing.h"

#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* What libfuse's binding says of an entry that gets no attributes, and of "." and "..": kernels look at neither. */
#define NO_NODE (UINT64_C(1) << 63) /* beyond all node ids in use; the kernel sends it back to be forgotten */
#define UNSAID_SECONDS 300
#define LONGEST_SECONDS 1e9 /* that can be counted in nanoseconds */

static struct fuse_direntplus *entry_at(const struct page *p, size_t at)
{
    return (void *)(p->buffer->data + sizeof(struct fuse_out_header) + at);
}

void page_begin(struct page *p, struct buffer *buffer, size_t size, struct nodes *nodes, double name)
{
    memset(buffer->data, 0, sizeof(struct fuse_out_header));
    *p = (struct page){.buffer = buffer, .size = size, .nodes = nodes, .name = name, .shortest = name};
    nodes_hold(nodes);
    nodes_lifetimes(nodes, &p->lifetimes);
}

void page_end(struct page *p)
{
    if (p->buffer)
        buffer_drop(p->buffer);
    if (p->nodes)
        nodes_drop(p->nodes);
}

/* Append an entry of which nothing but the name is known. */
static struct fuse_direntplus *append(struct page *p, const struct name *name, size_t length, uint64_t number)
{
    struct fuse_direntplus *entry = entry_at(p, p->length);
    memset(entry, 0, length);
    entry->dirent.off = number + 1;
    entry->dirent.namelen = (uint32_t)name->length;
    memcpy(entry->dirent.name, name->bytes, name->length);
    p->length += length;
    return entry;
}

static void put_entry(struct fuse_direntplus *entry, uint64_t nodeid, uint32_t mode)
{
    entry->entry_out.nodeid = entry->entry_out.attr.ino = entry->dirent.ino = nodeid;
    entry->entry_out.attr.mode = mode;
    entry->dirent.type = (mode & S_IFMT) >> 12;
}

static void put_unsaid(struct fuse_direntplus *entry, uint64_t nodeid, const struct stat *st)
{
    entry->entry_out.entry_valid = entry->entry_out.attr_valid = UNSAID_SECONDS;
    entry->entry_out.attr.nlink = 1;
    entry->entry_out.attr.blksize = TM_PAGE;
    put_entry(entry, nodeid, st ? st->st_mode : 0);
}

static void count_seconds(struct page *p, double seconds)
{
    p->short_lived += seconds < p->name;
    p->shortest = seconds < p->shortest ? seconds : p->shortest;
}

/* What was told for `seconds`, from before it was looked up. */
static int64_t believed_until(const struct page *p, double seconds)
{
    seconds = seconds < p->lifetimes.name ? seconds : p->lifetimes.name;
    seconds = seconds < LONGEST_SECONDS ? seconds : LONGEST_SECONDS;
    return p->now_ns + (int64_t)(seconds * 1e9);
}

/* Which node it is; -1: no memory. */
static int put_found(struct page *p, struct fuse_direntplus *entry, const struct stat *st, int fd)
{
    struct node found = {.device = st->st_dev, .number = st->st_ino, .kind = st->st_mode & S_IFMT, .fd = fd};
    struct node *one = nodes_meet(p->nodes, &found, (double)timing_now() / 1e9, false);
    if (!one) {
        errno = ENOMEM;
        return -1;
    }
    one->lookups++;
    p->nfound++;
    double seconds = put_looked_up(&p->lifetimes, st, &entry->entry_out);
    if (one->stored_to) {
        entry->entry_out.attr_valid = entry->entry_out.attr_valid_nsec = 0;
        seconds = 0;
    }
    struct fuse_entry_out *out = &entry->entry_out;
    nodes_tell_time(p->nodes, one, &out->attr, &out->attr_valid, &out->attr_valid_nsec);
    put_entry(entry, one->nodeid, st->st_mode);
    entry->entry_out.generation = one->generation;
    count_seconds(p, seconds);
    /* A directory tells of a file on another device, or whose node has another number, by a number that is not the node's. */
    if (found.device == p->lifetimes.device && found.number == one->nodeid)
        nodes_told(p->nodes, one->nodeid, one->stored_to ? 0 : believed_until(p, seconds));
    return 0;
}

/* Append only the name of a file that the kernel believes to know; false: it may not, or not for long enough. */
static bool put_known(struct page *p, const struct name *name, size_t length, uint64_t number)
{
    int64_t left_ns = (p->tells && name->number ? nodes_believed(p->nodes, name->number) : 0) - p->now_ns;
    if (left_ns < LEAST_BELIEVED_NS)
        return false;
    struct fuse_direntplus *entry = append(p, name, length, number); /* node 0: the kernel looks at nothing else */
    entry->dirent.ino = name->number;
    entry->dirent.type = name->type;
    count_seconds(p, (double)left_ns / 1e9);
    return true;
}

int page_step(struct page *p, int directory, const struct name *names, unsigned n, uint64_t number, bool may_wait,
              bool *full)
{
    struct stat st;
    unsigned i;
    p->waits = *full = false;
    p->now_ns = (int64_t)timing_now();
    for (i = 0; i < n; i++) {
        size_t length = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + names[i].length);
        if ((*full = length > p->size - p->length))
            break;
        if (name_is_dots(names[i].bytes, names[i].length)) {
            st = (struct stat){.st_ino = names[i].number, .st_mode = S_IFDIR};
            if (!st.st_ino && fstatat(directory, names[i].bytes, &st, 0))
                goto failed;
            put_unsaid(append(p, &names[i], length, number + i), st.st_ino, &st);
            continue;
        }
        if (put_known(p, &names[i], length, number + i))
            continue;
        if ((p->waits = p->asks && !may_wait && number + i >= p->looked))
            break;
        int fd = look_up_name(nodes_patience(p->nodes), directory, names[i].bytes, may_wait, &st);
        if (fd < 0 && errno == ENOENT)
            continue;
        if ((p->waits = fd < 0 && !may_wait && errno == EAGAIN))
            break;
        struct fuse_direntplus *entry = append(p, &names[i], length, number + i);
        if (fd < 0) { /* it has a name all the same */
            put_unsaid(entry, NO_NODE, NULL);
        } else if (put_found(p, entry, &st, fd)) {
            p->length -= length;
            goto failed;
        }
    }
    return (int)i;
failed:
    *full = true;
    return p->length ? (int)i : -1;
}

void ends_init(struct ends *e) { pthread_mutex_init(&e->lock, NULL); }

void ends_free(struct ends *e) { pthread_mutex_destroy(&e->lock); }

enum { PLACES = sizeof((struct ends *)0)->last / sizeof((struct ends *)0)->last[0] };

void ends_note(struct ends *e, uint64_t fh, uint64_t number)
{
    pthread_mutex_lock(&e->lock);
    if (number || e->last[fh % PLACES].fh == fh) {
        e->last[fh % PLACES].fh = fh;
        e->last[fh % PLACES].number = number;
    }
    pthread_mutex_unlock(&e->lock);
}

bool ends_at(struct ends *e, uint64_t fh, uint64_t number)
{
    pthread_mutex_lock(&e->lock);
    bool found = number && e->last[fh % PLACES].fh == fh && e->last[fh % PLACES].number == number;
    pthread_mutex_unlock(&e->lock);
    return found;
}
