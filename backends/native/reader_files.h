/* What the reader knows of open files: handle -> gate and mark. */
#ifndef READER_FILES_H
#define READER_FILES_H

#include "reader.h"

struct gate {
    _Atomic uint32_t refs;
    pthread_mutex_t lock; /* held for a copy of the rest */
    bool open;
    uint64_t size;
    uint8_t oid[TM_OID];
};

/* What one READ needs, copied: nothing of it changes while the request is served. */
struct target {
    uint8_t oid[TM_OID];
    uint64_t size;
    int fd;
};

struct files {
    pthread_mutex_t lock;
    struct file **buckets;
    unsigned nbuckets, count; /* a power of two */
};

int files_init(struct files *f);
void files_free(struct files *f);
int files_add(struct files *f, uint64_t fh, int fd, struct gate *gate);
void files_remove(struct files *f, uint64_t fh);
void files_mark(struct files *f, uint64_t fh, uint64_t offset);
/* Whether a READ of [offset, end) may be answered, and from what. Takes the mark away that it reaches. */
bool files_find(struct files *f, uint64_t fh, uint64_t end, struct target *out);

#endif
