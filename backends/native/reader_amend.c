#include "reader_amend.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>

#ifndef FOPEN_PASSTHROUGH /* Linux 6.9; Debian 12's header is older */
#define FOPEN_PASSTHROUGH (1 << 7)
#endif

#ifndef FOPEN_NOFLUSH /* Linux 5.18; older kernels ignore it */
#define FOPEN_NOFLUSH (1 << 5)
#endif

struct amendment {
    struct amendment *next;
    uint64_t fh;
    int32_t backing_id;
};

void amendments_init(struct amendments *all)
{
    pthread_mutex_init(&all->lock, NULL);
    all->first = NULL;
}

void amendments_free(struct amendments *all)
{
    for (struct amendment *a = all->first, *next; a; a = next) {
        next = a->next;
        free(a);
    }
    pthread_mutex_destroy(&all->lock);
}

static int add(struct amendments *all, struct amendment what)
{
    struct amendment *a = malloc(sizeof *a);
    if (!a)
        return -1;
    *a = what;
    pthread_mutex_lock(&all->lock);
    a->next = all->first;
    all->first = a;
    pthread_mutex_unlock(&all->lock);
    return 0;
}

int amend_file(struct amendments *all, uint64_t fh, int32_t backing_id)
{
    return add(all, (struct amendment){.fh = fh, .backing_id = backing_id});
}

static struct amendment *take(struct amendments *all, uint64_t fh)
{
    struct amendment **p = &all->first, *a;
    pthread_mutex_lock(&all->lock);
    while (*p && (*p)->fh != fh)
        p = &(*p)->next;
    if ((a = *p))
        *p = a->next;
    pthread_mutex_unlock(&all->lock);
    return a;
}

void amend(struct amendments *all, uint32_t opcode, bool reads_only, uint8_t *reply, size_t length)
{
    struct fuse_out_header out;
    struct fuse_open_out open;
    if (opcode != FUSE_OPEN && opcode != FUSE_CREATE)
        return;
    size_t at = sizeof out + (opcode == FUSE_CREATE ? sizeof(struct fuse_entry_out) : 0);
    if (length < at + sizeof open)
        return;
    memcpy(&out, reply, sizeof out);
    memcpy(&open, reply + at, sizeof open);
    if (out.error)
        return;
    struct amendment *a = take(all, open.fh);
    if (a) {
        open.open_flags = (open.open_flags & ~(uint32_t)(FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE)) | FOPEN_PASSTHROUGH;
        open.padding = (uint32_t)a->backing_id; /* its name in older headers */
    }
    if (reads_only)
        open.open_flags |= FOPEN_NOFLUSH;
    memcpy(reply + at, &open, sizeof open);
    free(a);
}
