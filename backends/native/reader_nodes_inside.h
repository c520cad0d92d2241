/* The table of nodes, for the files that it is made of: `reader_nodes.c` (finding, counting, telling) and
 * `reader_node_files.c` (the lower files behind them). */
#ifndef READER_NODES_INSIDE_H
#define READER_NODES_INSIDE_H

#include "reader_nodes.h"

#include <pthread.h>
#include <stdatomic.h>

struct nodes {
    _Atomic uint32_t refs;
    int root;
    uint64_t device; /* the root's */
    size_t quota, batch;
    bool by_handle, numbers_tell, is_fuse;
    struct patience patience; /* needs no lock */

    pthread_mutex_t lock; /* of the rest, against those who ask for attributes */
    struct lifetimes lifetimes;
    int reports; /* readable: there are reports of changes that nobody has read; -1: there are none at all */
    uint64_t rounds; /* of reports that have begun */
    bool catches_up; /* within one */
    struct node **by_id, **by_key;
    size_t nbuckets, count;       /* of each, a power of two; nodes */
    struct node *oldest, *newest; /* of those that are open */
    size_t nopen, nbeside;
    uint64_t next_foreign;
    uint32_t last_generation;
    uint32_t doubts; /* how often all names were doubted */
};

/* The lock is held: append it to those that are open, or take it from there. */
void nodes_append_open(struct nodes *n, struct node *one);
void nodes_take_from_open(struct nodes *n, struct node *one);
/* The lock is held. Its descriptor is the caller's from now on, -1: it had none. */
int nodes_take_descriptor(struct nodes *n, struct node *one);
/* Give it a descriptor, and close old ones beyond the quota. */
void nodes_keep(struct nodes *n, struct node *one, int fd);
/* The handle of the file open at `fd`, which has the device of `one`; NULL: none. */
struct handle *nodes_ask_handle(const struct nodes *n, const struct node *one, int fd);
/* Whether a node of this device that is open is the one file with its device and number. */
bool nodes_numbers_tell(const struct nodes *n, uint64_t device);
/* The chain of those with this key. */
struct node *nodes_first_with(const struct nodes *n, uint64_t device, uint64_t number);

#endif
