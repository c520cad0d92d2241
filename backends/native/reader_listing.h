/* A page of a directory's entries with their attributes: the reply to one READDIRPLUS.
 *
 * Names are looked up here, many at a time, and the lookups counted in the table. A name is looked up only if there is room
 * for its entry. Of a file whose name and attributes a listing has told, and the kernel still believes, there is only the name and
 * the number: the kernel asks for what it does not know. So what is told is no hint that could be wrong, and nothing is
 * believed for longer. Threading: the event loop's
 * thread, as for the table. */
#ifndef READER_LISTING_H
#define READER_LISTING_H

#include "reader_buffers.h"
#include "reader_names.h"
#include "reader_nodes.h"

#include <pthread.h>

#define LEAST_BELIEVED_NS INT64_C(50000000) /* for which it must be: programs ask for attributes right after a page */

struct page {
    struct buffer *buffer; /* begins with the header of a reply, as `undo` wants it */
    size_t length, size;   /* of the entries, so far and at most */
    struct lifetimes lifetimes;
    struct nodes *nodes;   /* a reference */
    int64_t now_ns;        /* monotonic, before the last step */
    unsigned nfound;       /* files whose lookups were counted */
    bool waits;            /* it ended before a name that would have to be waited for */
    bool asks;             /* any may have to be: nothing tells whether attributes are at hand */
    uint64_t looked;       /* before this number a thread has looked at names a moment ago */
    bool tells;            /* the numbers of names are those of files on the root's device */
    double name;           /* seconds for which names of the directory are believed */
    unsigned short_lived;  /* entries whose attributes are believed for less */
    double shortest;       /* seconds, of those; `name` if there are none */
};

/* A page of at most `size` bytes in `buffer`, of a directory whose names are believed `name` seconds. Both the buffer and a
 * reference to `nodes` are the page's. */
void page_begin(struct page *p, struct buffer *buffer, size_t size, struct nodes *nodes, double name);
void page_end(struct page *p);
/* Look up names[0] and so on, whose entries get the numbers from `number` on; how many are dealt with. *full: the next one
 * does not fit. Unless it `may_wait`, only as far as `look_up_name` goes then. Those that are gone get no entry, those that
 * cannot be looked up one without attributes. -1: errno of the first one, which the page would begin with: "." or "..", or no
 * memory; at another one the page ends. */
int page_step(struct page *p, int directory, const struct name *names, unsigned n, uint64_t number, bool may_wait,
              bool *full);

/* Where listings end whose ends were reported: programs ask once more, which need not be Python's. One place for many
 * handles, the last one has it: a listing that lost it is asked in Python. For any thread. */
struct ends {
    pthread_mutex_t lock;
    struct {
        uint64_t fh, number; /* handles are never given out twice */
    } last[64];
};

void ends_init(struct ends *e);
void ends_free(struct ends *e);
/* The listing `fh` has no entry from `number` on; 0: it is not known where it ends, for it begins anew. */
void ends_note(struct ends *e, uint64_t fh, uint64_t number);
bool ends_at(struct ends *e, uint64_t fh, uint64_t number);

#endif
