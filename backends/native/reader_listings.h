/* Directories that are open, and their listings.
 *
 * A listing is a snapshot of the names at the time it begins, so entries that come and go meanwhile neither skip nor
 * repeat others; each entry's attributes are as of when it is reported (`reader_listing.h`). Of a directory whose content was
 * reported to its end its node remembers which version that was, and for how long the kernel may believe it.
 *
 * Threading: the event loop's thread, as for the table of nodes, with or without the interpreter's lock. Handles are given
 * out by this table alone. */
#ifndef READER_LISTINGS_H
#define READER_LISTINGS_H

#include "reader_names.h"
#include "reader_listing.h"
#include "reader_nodes.h"

/* Which listing of a directory the kernel has, and until when it may believe it (monotonic). */
struct listed {
    unsigned refs; /* of the node, and of listings */
    struct version version;
    int64_t until_ns;
    size_t count;
    uint64_t after[]; /* of each name (`struct name`) */
};

void listed_drop(struct listed *one); /* may be NULL */

struct listing {
    struct listing *next;     /* in its bucket */
    uint64_t fh, nodeid;
    uint32_t generation;      /* of the node, which may be another's by now */
    uint64_t device, number;  /* of the directory; number 0: it was not asked for */
    int fd;
    bool was_read;            /* its position is not the beginning */
    struct version version;   /* when it was opened */
    struct version told;      /* the kernel may keep what it gets, as of that version; none: it may not */
    struct listed *kept;      /* what it may have already, a reference; NULL: nothing */
    struct names *content;    /* NULL: nobody has asked yet, or the kernel had all */
    uint64_t base;            /* its first name has this number */
    bool over;                /* all of it was reported */
    int64_t begun_ns;         /* monotonic */
    unsigned short_lived;     /* entries whose attributes the kernel believes less long than names */
    double shortest;          /* for so many seconds at least */
};

struct listings;
struct listings *listings_new(struct nodes *nodes); /* one reference, and one to `nodes`; NULL: no memory */
void listings_hold(struct listings *l);
void listings_drop(struct listings *l); /* descriptors stay open: code that takes over may have them */
void listings_close_all(struct listings *l);

/* The next handle that is given out. */
uint64_t listings_number(const struct listings *l);
void listings_number_from(struct listings *l, uint64_t next);
struct listing *listings_find(const struct listings *l, uint64_t fh); /* NULL: there is none */
/* Call `visit` for each until it returns false. */
bool listings_each(const struct listings *l, bool (*visit)(struct listing *, void *), void *with);

/* A descriptor of the directory `nodeid` to open it by, and its device; -1: errno. */
int listings_way(struct listings *l, uint64_t nodeid, uint64_t *device);
/* Whether to open or to read a directory of this device may take longer than others can wait, as far as can be told:
 * the root's device, if it is `local`, does not, unless names were not at hand lately (`reads`). */
bool listings_wait(struct listings *l, uint64_t device, bool local, bool reads);
/* Open the directory that `way` leads to, for any thread; -1: errno. */
int listing_open_at(int way, struct stat *st);
/* Take in a directory that is open at `fd`, which is the table's then; `st` NULL: not asked for. NULL: errno, and `fd` is the
 * caller's still. */
struct listing *listings_add(struct listings *l, uint64_t nodeid, int fd, const struct stat *st);
/* FOPEN flags of the reply: whether the kernel may keep what it will get, and believe what it has. */
uint32_t listings_flags(struct listings *l, struct listing *one);
bool listings_close(struct listings *l, uint64_t fh); /* false: there is none */

/* Whether names from `number` on take reading the directory first. They do also amid a listing that the kernel had, and has lost:
 * because somebody else has listed the directory since, or for want of memory. */
bool listings_lacks(const struct listing *one, uint64_t number);
/* Where such names begin (`names_read`): at what comes after the one before in what the kernel had, whatever has become of others
 * since. If that is not known, all names are read, and the first ones left out. */
uint64_t listings_from(const struct listings *l, const struct listing *one, uint64_t number);
/* Begin it anew, or go on at `number`, with this content, which is the listing's then. */
void listings_begin(struct listings *l, struct listing *one, struct names *content, uint64_t number);
/* How many of its names there are from `number` on, and where. */
size_t listings_left(const struct listing *one, uint64_t number, const struct name **names);
/* For how long names in it are believed, in seconds. */
double listings_lifetime(struct listings *l, const struct listing *one);
/* Append entries from `*number` on to the page, which goes on to the next one. `may_wait` as for `page_step`. 0, or errno if
 * there is no entry and will be none. */
int listings_fill(struct listings *l, struct listing *one, struct page *p, uint64_t *number, bool may_wait);
/* Everything before `number` has been reported. Whether that is all, so that nobody has to be asked what comes then. */
bool listings_reported(struct listings *l, struct listing *one, const struct page *p, uint64_t number);

#endif
