#include "reader_opens.h"

#include "reader_hits.h"
#include "reader_look.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef FOPEN_NOFLUSH /* Linux 5.18; older kernels ignore it */
#define FOPEN_NOFLUSH (1 << 5)
#endif

enum {
    FIRST_PLACES = 256,
    NAME_COUNTS = 1 << 18, /* of remembered names by their hash: with all 100,000 that Python remembers every third new name
                            * is taken for one, and goes to Python */
};

#define COARSE_NS (2 * SECOND_NS) /* two changes this close may carry the same time stamp (`fs/identity.py`) */
#define DAY_NS (24 * 3600 * SECOND_NS)

/* Flags that make an open unusual, beside writing. */
#define UNUSUAL (O_ACCMODE | O_TRUNC | O_APPEND | O_NOATIME | O_SYNC | O_DSYNC)

struct known {
    uint64_t nodeid; /* 0: a free place */
    dev_t device;
    ino_t number;      /* what the node must still be */
    struct gate *gate; /* a reference; NULL: opens are Python's */
};

/* Open addressing; a place that becomes free is closed up, so that a search ends at the first free one. */
struct opens {
    _Atomic uint32_t refs;
    struct grant grant;
    uint64_t next; /* handle */
    struct known *places;
    size_t nplaces, count; /* a power of two, at most half of it used */
    uint8_t *names;        /* NULL: none is remembered; a count that is full stays so */
    struct opened opened[UNLEARNED_MOST];
    uint64_t first[UNLEARNED_MOST]; /* nodes whose gate was made here */
    unsigned nopened, nfirst;
    bool blind; /* there was no memory to remember names: all first opens are Python's */
};

struct opens *opens_new(void)
{
    struct opens *o = calloc(1, sizeof *o);
    if (!o)
        return NULL;
    o->nplaces = FIRST_PLACES;
    o->next = 1;
    if (!(o->places = calloc(o->nplaces, sizeof *o->places))) {
        free(o);
        return NULL;
    }
    atomic_init(&o->refs, 1);
    return o;
}

void opens_hold(struct opens *o) { atomic_fetch_add(&o->refs, 1); }

void opens_drop(struct opens *o)
{
    if (atomic_fetch_sub(&o->refs, 1) != 1)
        return;
    for (unsigned i = 0; i < o->nopened; i++)
        close(o->opened[i].fd);
    for (size_t i = 0; i < o->nplaces; i++)
        if (o->places[i].gate)
            gate_drop(o->places[i].gate);
    free(o->places);
    free(o->names);
    free(o);
}

/* ---- What Python says -------------------------------------------------------------------------------------- */

void opens_grant(struct opens *o, const struct grant *g) { o->grant = *g; }

uint64_t opens_number(struct opens *o) { return o->next++; }

void opens_number_from(struct opens *o, uint64_t next) { o->next = next; }

/* Node ids are inode numbers, which lie side by side. */
static size_t home_of(const struct opens *o, uint64_t nodeid)
{
    return (size_t)(nodeid * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (o->nplaces - 1);
}

/* Where a node is, or would be. */
static size_t place(const struct opens *o, uint64_t nodeid)
{
    size_t at = home_of(o, nodeid);
    while (o->places[at].nodeid && o->places[at].nodeid != nodeid)
        at = (at + 1) & (o->nplaces - 1);
    return at;
}

static bool grow(struct opens *o)
{
    struct opens larger = {.nplaces = o->nplaces * 2};
    if (!(larger.places = calloc(larger.nplaces, sizeof *larger.places)))
        return false;
    for (size_t i = 0; i < o->nplaces; i++)
        if (o->places[i].nodeid)
            larger.places[place(&larger, o->places[i].nodeid)] = o->places[i];
    free(o->places);
    o->places = larger.places;
    o->nplaces = larger.nplaces;
    return true;
}

int opens_know(struct opens *o, uint64_t nodeid, dev_t device, ino_t number, struct gate *gate)
{
    struct known *one = &o->places[place(o, nodeid)];
    if (!one->nodeid && o->count * 2 >= o->nplaces) {
        if (!grow(o))
            return -1;
        one = &o->places[place(o, nodeid)];
    }
    o->count += !one->nodeid;
    struct gate *before = one->gate;
    if (gate)
        gate_hold(gate);
    *one = (struct known){nodeid, device, number, gate};
    if (before)
        gate_drop(before);
    return 0;
}

void opens_forget(struct opens *o, uint64_t nodeid)
{
    size_t mask = o->nplaces - 1, hole = place(o, nodeid);
    if (!o->places[hole].nodeid)
        return;
    if (o->places[hole].gate)
        gate_drop(o->places[hole].gate);
    o->count--;
    o->places[hole] = (struct known){.nodeid = 0};
    for (size_t at = (hole + 1) & mask; o->places[at].nodeid; at = (at + 1) & mask) {
        size_t home = home_of(o, o->places[at].nodeid);
        if (((at - home) & mask) >= ((at - hole) & mask)) { /* its search passes the hole */
            o->places[hole] = o->places[at];
            o->places[at] = (struct known){.nodeid = 0};
            hole = at;
        }
    }
}

bool opens_knows(const struct opens *o, uint64_t nodeid) { return o->places[place(o, nodeid)].nodeid; }

static uint8_t *count_of(struct opens *o, const uint8_t *name)
{
    uint64_t words[TM_OID / 8];
    memcpy(words, name, sizeof words);
    return &o->names[object_hash(0, words) & (NAME_COUNTS - 1)];
}

void opens_remember(struct opens *o, const uint8_t *name, bool remembered)
{
    if (!o->names && !(o->names = calloc(NAME_COUNTS, 1))) {
        o->blind = true;
        return;
    }
    uint8_t *count = count_of(o, name);
    if (*count < UINT8_MAX)
        *count = (uint8_t)(remembered ? *count + 1 : *count - !!*count);
}

/* ---- What Python learns ------------------------------------------------------------------------------------ */

bool opens_news(const struct opens *o) { return o->nopened || o->nfirst; }

unsigned opens_learn_first(struct opens *o, uint64_t *nodeids, struct gate **gates)
{
    unsigned n = 0;
    for (unsigned i = 0; i < o->nfirst; i++) {
        struct known *one = &o->places[place(o, o->first[i])];
        if (!one->nodeid || !one->gate)
            continue;
        gate_hold(one->gate);
        nodeids[n] = o->first[i];
        gates[n++] = one->gate;
    }
    o->nfirst = 0;
    return n;
}

unsigned opens_learn_opened(struct opens *o, struct opened *out)
{
    unsigned n = o->nopened;
    memcpy(out, o->opened, n * sizeof *out);
    o->nopened = 0;
    return n;
}

/* ---- Requests ---------------------------------------------------------------------------------------------- */

static const struct opened *find(const struct opens *o, uint64_t fh)
{
    for (unsigned i = 0; i < o->nopened; i++)
        if (o->opened[i].fh == fh)
            return &o->opened[i];
    return NULL;
}

int opens_find(const struct opens *o, uint64_t fh)
{
    const struct opened *one = find(o, fh);
    return one ? one->fd : -1;
}

void opens_closed(struct opens *o, uint64_t fh)
{
    const struct opened *one = find(o, fh);
    if (one)
        o->opened[one - o->opened] = o->opened[--o->nopened];
}

bool opens_may(const struct opens *o, uint64_t nodeid, uint32_t flags)
{
    const struct known *one = &o->places[place(o, nodeid)];
    if (flags & UNUSUAL || o->nopened == UNLEARNED_MOST || (int64_t)timing_now() >= o->grant.until_ns)
        return false;
    return one->nodeid ? one->gate != NULL : !o->blind && o->nfirst < UNLEARNED_MOST;
}

/* Whether nobody has the file open for writing: as `fs/writers.py`, of a descriptor that only reads. -1: cannot be told. */
static int is_quiet(int fd)
{
    if (fcntl(fd, F_SETSIG, SIGURG) || fcntl(fd, F_SETLEASE, F_RDLCK)) /* a signal that is ignored by default */
        return errno == EAGAIN ? 0 : -1;
    (void)fcntl(fd, F_SETLEASE, F_UNLCK);
    return 1;
}

/* The name of a file, and of its object in the pool: as `identity.object_id`, if its handle is short enough. */
static bool name_of(int fd, uint64_t number, uint8_t *name)
{
    union {
        struct file_handle head;
        uint8_t bytes[sizeof(struct file_handle) + NAME_HANDLE];
    } room = {.head.handle_bytes = NAME_HANDLE};
    int mount_id;
    if (name_to_handle_at(fd, "", &room.head, &mount_id, AT_EMPTY_PATH) || room.head.handle_type <= 0
        || room.head.handle_type > UINT8_MAX)
        return false;
    memset(name, 0, TM_OID);
    name[0] = (uint8_t)room.head.handle_bytes;
    name[1] = (uint8_t)room.head.handle_type;
    for (unsigned i = 0; i < 8; i++)
        name[2 + i] = (uint8_t)(number >> 8 * i);
    memcpy(name + 2 + 8, room.head.f_handle, room.head.handle_bytes);
    return true;
}

static int64_t wall_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return ns_of(now);
}

/* The gate of a file that nothing is known of, with an empty object; NULL: it is Python's. */
static struct gate *begin(struct opens *o, struct hits *hits, uint64_t nodeid, int fd, const struct stat *st,
                          struct stamps *stamps)
{
    uint8_t name[TM_OID];
    int quiet = is_quiet(fd); /* after the version was seen, and before anything is read */
    int64_t newest_ns = stamps->mtime_ns > stamps->ctime_ns ? stamps->mtime_ns : stamps->ctime_ns;
    bool old = newest_ns < wall_ns() - COARSE_NS;
    if (!name_of(fd, st->st_ino, name) || (o->names && *count_of(o, name)) || !hits_flush(hits, name))
        return NULL;
    struct gate *g = gate_new();
    if (!g)
        return NULL;
    gate_set(g, name, stamps->size, true, true);
    stamps->quiet = quiet > 0;
    if (quiet < 0 ? old : quiet && (old || o->grant.fine))
        gate_trust(g, stamps);
    int rc = opens_know(o, nodeid, st->st_dev, st->st_ino, g);
    gate_drop(g); /* the table has it */
    if (rc)
        return NULL;
    o->first[o->nfirst++] = nodeid;
    return g;
}

static struct gate *gate_for(struct opens *o, struct hits *hits, uint64_t nodeid, int fd, struct stat *st, bool *unchanged)
{
    const struct known *one = &o->places[place(o, nodeid)];
    if (fstat(fd, st) || !S_ISREG(st->st_mode) || st->st_size <= 0) /* some file systems say 0 of files with content */
        return NULL;
    struct stamps stamps;
    if (!stamps_of(st, &stamps) || !has_ns(st->st_atim))
        return NULL;
    *unchanged = one->nodeid != 0;
    if (!*unchanged)
        return begin(o, hits, nodeid, fd, st, &stamps);
    bool same = st->st_dev == one->device && st->st_ino == one->number && gate_shows(one->gate, &stamps);
    return same ? one->gate : NULL;
}

/* relatime's rule (`fs/lower.py`). */
static bool was_accessed(const struct stat *st)
{
    int64_t changed_ns = ns_of(st->st_mtim) > ns_of(st->st_ctim) ? ns_of(st->st_mtim) : ns_of(st->st_ctim);
    return ns_of(st->st_atim) > changed_ns && ns_of(st->st_atim) > wall_ns() - DAY_NS;
}

bool opens_open(struct opens *o, struct hits *hits, const struct fuse_in_header *in, int node, struct fuse_open_out *out,
                bool *doubt)
{
    struct stat st;
    bool unchanged;
    /* Who holds a lease that this would break is waited for in Python. */
    int fd = open_again(node, O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        return false;
    struct gate *gate = gate_for(o, hits, in->nodeid, fd, &st, &unchanged);
    uint64_t fh = o->next;
    if (!gate || files_add(&hits->files, fh, fd, gate, true)) {
        close(fd);
        return false;
    }
    o->next++;
    bool accessed = o->grant.accessed || was_accessed(&st);
    if (!accessed)
        files_note(&hits->files, fh); /* so that the first read that hits is noted, in Python */
    o->opened[o->nopened++] = (struct opened){fh, in->nodeid, fd, in->uid, in->gid, in->pid, accessed};
    bool kept = (uint64_t)st.st_size <= o->grant.kept_bytes;
    *doubt = kept && !unchanged; /* an old size must not cut reads */
    *out = (struct fuse_open_out){.fh = fh};
    out->open_flags = FOPEN_NOFLUSH | (!kept ? FOPEN_DIRECT_IO : unchanged ? FOPEN_KEEP_CACHE : 0u);
    return true;
}
