#include "reader_listings.h"

#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    BUCKETS = 256,
    FEW = 5,         /* attributes that are asked for one by one cost about so many times as much as in a listing */
    AT_A_TIME = 256, /* names that are looked up in one step */
};

#define SECOND_NS 1e9
#define LONGEST_SECONDS 1e9 /* that can be counted in nanoseconds */

struct listings {
    _Atomic uint32_t refs;
    struct nodes *nodes; /* a reference */
    uint64_t next;       /* handle */
    struct listing *buckets[BUCKETS];
};

/* ---- Life -------------------------------------------------------------------------------------------------- */

struct listings *listings_new(struct nodes *nodes)
{
    struct listings *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    atomic_init(&l->refs, 1);
    nodes_hold(l->nodes = nodes);
    l->next = 1;
    return l;
}

void listings_hold(struct listings *l) { atomic_fetch_add(&l->refs, 1); }

void listed_drop(struct listed *one)
{
    if (one && !--one->refs)
        free(one);
}

static struct listed *hold(struct listed *one)
{
    one->refs++;
    return one;
}

static void free_one(struct listing *one)
{
    names_free(one->content);
    listed_drop(one->kept);
    free(one);
}

static void clear(struct listings *l, bool closes)
{
    for (unsigned i = 0; i < BUCKETS; i++) {
        for (struct listing *one = l->buckets[i], *next; one; one = next) {
            next = one->next;
            if (closes)
                close(one->fd);
            free_one(one);
        }
        l->buckets[i] = NULL;
    }
}

void listings_drop(struct listings *l)
{
    if (atomic_fetch_sub(&l->refs, 1) != 1)
        return;
    clear(l, false);
    nodes_drop(l->nodes);
    free(l);
}

void listings_close_all(struct listings *l) { clear(l, true); }

uint64_t listings_number(const struct listings *l) { return l->next; }

void listings_number_from(struct listings *l, uint64_t next) { l->next = next; }

struct listing *listings_find(const struct listings *l, uint64_t fh)
{
    struct listing *one = l->buckets[fh % BUCKETS];
    while (one && one->fh != fh)
        one = one->next;
    return one;
}

bool listings_each(const struct listings *l, bool (*visit)(struct listing *, void *), void *with)
{
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct listing *one = l->buckets[i]; one; one = one->next)
            if (!visit(one, with))
                return false;
    return true;
}

/* ---- Opening and closing ----------------------------------------------------------------------------------- */

int listings_way(struct listings *l, uint64_t nodeid, uint64_t *device)
{
    struct node *node = nodes_find(l->nodes, nodeid);
    if (node) {
        *device = node->device;
        return nodes_descriptor(l->nodes, node);
    }
    errno = ESTALE;
    return -1;
}

bool listings_wait(struct listings *l, uint64_t device, bool local, bool reads)
{
    struct patience *p = nodes_patience(l->nodes);
    return !nodes_is_here(l->nodes, device, local) || (reads && !patience_is_quick(p) && patience_missed_lately(p));
}

int listing_open_at(int way, struct stat *st)
{
    int fd;
    do
        fd = openat(way, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    return look_at_open(fd, st);
}

struct listing *listings_add(struct listings *l, uint64_t nodeid, int fd, const struct stat *st)
{
    const struct node *node = nodes_find(l->nodes, nodeid);
    struct listing *one = node ? calloc(1, sizeof *one) : NULL;
    if (!one) {
        errno = node ? ENOMEM : ESTALE;
        return NULL;
    }
    *one = (struct listing){.fh = l->next++, .nodeid = nodeid, .generation = node->generation, .device = node->device, .fd = fd};
    if (st) {
        one->number = st->st_ino;
        one->version = version_settled(st);
    }
    one->next = l->buckets[one->fh % BUCKETS];
    l->buckets[one->fh % BUCKETS] = one;
    return one;
}

/* Its node; NULL: the kernel has forgotten it. */
static struct node *node_of(const struct listings *l, const struct listing *one)
{
    struct node *node = nodes_find(l->nodes, one->nodeid);
    return node && node->generation == one->generation ? node : NULL;
}

/* Whether somebody is amid a listing that the kernel keeps, of another version: it would go on with this one, by number. */
static bool disturbs(const struct listings *l, const struct listing *one)
{
    for (unsigned i = 0; i < BUCKETS; i++)
        for (const struct listing *other = l->buckets[i]; other; other = other->next)
            if (other != one && other->nodeid == one->nodeid && other->generation == one->generation && other->told.known
                && !other->over && !version_equals(&other->told, &one->version))
                return true;
    return false;
}

/* Only as long as it believes the attributes of most entries, which came with it: it would ask for each of them, when a
 * new listing brings all at once for a fifth of the time a name. */
uint32_t listings_flags(struct listings *l, struct listing *one)
{
    const struct node *node = node_of(l, one);
    one->version.known = one->version.known && !disturbs(l, one);
    one->told = one->version;
    if (!one->told.known)
        return 0;
    bool same = node && node->listed && version_equals(&node->listed->version, &one->told);
    if (same)
        one->kept = hold(node->listed);
    bool believe = same && (int64_t)timing_now() < node->listed->until_ns;
    return FOPEN_CACHE_DIR | (believe ? FOPEN_KEEP_CACHE : 0u);
}

bool listings_close(struct listings *l, uint64_t fh)
{
    struct listing **p = &l->buckets[fh % BUCKETS], *one;
    while (*p && (*p)->fh != fh)
        p = &(*p)->next;
    if (!(one = *p))
        return false;
    *p = one->next;
    close(one->fd);
    free_one(one);
    return true;
}

/* ---- Listing ----------------------------------------------------------------------------------------------- */

/* Have a node remember which listing was told, until a time; without memory, none. */
static void note(struct node *node, const struct listing *one, int64_t until_ns)
{
    const struct names *c = one->content;
    listed_drop(node->listed);
    if (!(node->listed = malloc(sizeof *node->listed + c->count * sizeof node->listed->after[0])))
        return;
    *node->listed = (struct listed){.refs = 1, .version = one->version, .until_ns = until_ns, .count = c->count};
    for (size_t i = 0; i < c->count; i++)
        node->listed->after[i] = c->all[i].after;
}

double listings_lifetime(struct listings *l, const struct listing *one)
{
    struct lifetimes lifetimes;
    nodes_lifetimes(l->nodes, &lifetimes);
    return one->device == lifetimes.device ? lifetimes.name : lifetimes.name_elsewhere;
}

bool listings_lacks(const struct listing *one, uint64_t number)
{
    return !number || !one->content || number < one->base;
}

uint64_t listings_from(const struct listings *l, const struct listing *one, uint64_t number)
{
    const struct node *node = node_of(l, one);
    const struct listed *had = one->kept;
    if (!had && node && node->listed && version_equals(&node->listed->version, &one->told))
        had = node->listed;
    return had && number && number <= had->count ? had->after[number - 1] : 0;
}

void listings_begin(struct listings *l, struct listing *one, struct names *content, uint64_t number)
{
    struct node *node = node_of(l, one);
    if (node && !number) {
        listed_drop(node->listed);
        node->listed = NULL;
    }
    names_free(one->content);
    one->content = content;
    one->base = content->from ? number : 0;
    one->over = false;
    one->begun_ns = (int64_t)timing_now();
    one->short_lived = 0;
    one->shortest = listings_lifetime(l, one);
    /* Where a directory tells its own number as stat does, it tells its parent's. */
    bool tells = one->number && content->count >= 2 && content->all[0].number == one->number;
    for (unsigned i = 0; !tells && !content->from && i < 2 && i < content->count; i++)
        content->all[i].number = 0;
    if (number || !version_equals(&content->after, &one->version))
        one->version.known = false;
}

size_t listings_left(const struct listing *one, uint64_t number, const struct name **names)
{
    size_t count = one->content ? one->content->count : 0;
    if (number < one->base || number - one->base >= count)
        return 0;
    *names = one->content->all + (number - one->base);
    return count - (size_t)(number - one->base);
}

int listings_fill(struct listings *l, struct listing *one, struct page *p, uint64_t *number, bool may_wait)
{
    const struct name *names;
    size_t left;
    bool full = false;
    p->waits = false;
    p->tells = one->device == nodes_device(l->nodes);
    while ((left = listings_left(one, *number, &names)) && !full && !p->waits) {
        unsigned n = left < AT_A_TIME ? (unsigned)left : AT_A_TIME;
        int done = page_step(p, one->fd, names, n, *number, may_wait, &full);
        if (done < 0)
            return errno;
        *number += (unsigned)done;
    }
    return !left && !p->length && one->content ? one->content->error : 0;
}

bool listings_reported(struct listings *l, struct listing *one, const struct page *p, uint64_t number)
{
    struct node *node = node_of(l, one);
    const struct name *names;
    one->short_lived += p->short_lived;
    one->shortest = p->shortest < one->shortest ? p->shortest : one->shortest;
    if (!one->content || listings_left(one, number, &names) || one->content->error)
        return false;
    one->over = true;
    if (node && one->version.known) {
        bool many = (uint64_t)one->short_lived * FEW >= one->content->count;
        double seconds = many ? one->shortest : p->name;
        seconds = seconds < LONGEST_SECONDS ? seconds : LONGEST_SECONDS;
        note(node, one, one->begun_ns + (int64_t)(seconds * SECOND_NS));
    }
    return true;
}
