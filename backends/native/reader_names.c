#include "reader_names.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    PIECE_BYTES = 32 << 10, /* of a call for names */
    FIRST_ROOM = 32,        /* names */
    COARSE_SECONDS = 2,     /* two changes this close may carry the same time stamp (`fs/identity.py`) */
};

/* What one call has brought, as it came. */
struct piece {
    struct piece *next;
    char bytes[]; /* struct dirent64, one after the other */
};

static int add(struct names *c, const char *bytes, size_t length, uint64_t number, uint32_t type, uint64_t after)
{
    if (c->count == c->room) {
        size_t room = c->room ? c->room * 2 : FIRST_ROOM;
        struct name *larger = realloc(c->all, room * sizeof *larger);
        if (!larger)
            return -1;
        c->all = larger;
        c->room = room;
    }
    c->all[c->count++] = (struct name){bytes, length, type == DT_UNKNOWN ? 0 : number, after, type};
    return 0;
}

static struct piece *keep(struct names *c, const char *bytes, size_t length)
{
    struct piece *p = malloc(sizeof *p + length);
    if (!p)
        return NULL;
    memcpy(p->bytes, bytes, length);
    p->next = c->pieces;
    return c->pieces = p;
}

static int add_piece(struct names *c, const char *bytes, size_t length)
{
    const struct piece *p = keep(c, bytes, length);
    if (!p)
        return -1;
    for (size_t at = 0; at < length;) {
        const struct dirent64 *entry = (const void *)(p->bytes + at);
        const char *name = entry->d_name;
        size_t bytes_long = strlen(name);
        at += entry->d_reclen;
        if (!name_is_dots(name, bytes_long)) {
            if (add(c, name, bytes_long, entry->d_ino, entry->d_type, (uint64_t)entry->d_off))
                return -1;
        } else if (!c->from) {
            c->all[name[1] ? 1 : 0].number = entry->d_ino;
        }
    }
    return 0;
}

struct names *names_read(int fd, bool again, uint64_t from)
{
    _Alignas(struct dirent64) char piece[PIECE_BYTES];
    struct stat st;
    struct names *c = calloc(1, sizeof *c);
    if (!c || (!from && (add(c, ".", 1, 0, DT_DIR, 0) || add(c, "..", 2, 0, DT_DIR, 0))))
        goto failed;
    c->from = from;
    ssize_t n = (again || from) && lseek(fd, (off_t)from, SEEK_SET) < 0 ? -1 : 0;
    while (n >= 0) {
        n = getdents64(fd, piece, sizeof piece);
        if (n > 0 && add_piece(c, piece, (size_t)n))
            goto failed;
        if (!n)
            break;
        if (n < 0 && errno == EINTR)
            n = 0;
    }
    c->error = n < 0 ? errno : 0;
    if (c->error && !from && c->count == 2)
        c->count = 0;
    if (!fstat(fd, &st))
        c->after = version_settled(&st);
    return c;
failed:
    names_free(c);
    return NULL;
}

struct names *names_of(const char *const *names, size_t count)
{
    struct names *c = calloc(1, sizeof *c);
    for (size_t i = 0; c && i < count; i++) {
        size_t bytes_long = strlen(names[i]);
        const struct piece *p = keep(c, names[i], bytes_long + 1);
        if (!p || add(c, p->bytes, bytes_long, 0, DT_UNKNOWN, 0)) {
            names_free(c);
            return NULL;
        }
    }
    return c;
}

void names_free(struct names *c)
{
    if (!c)
        return;
    for (struct piece *p = c->pieces, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    free(c->all);
    free(c);
}

struct version version_settled(const struct stat *st)
{
    time_t newest = st->st_mtim.tv_sec > st->st_ctim.tv_sec ? st->st_mtim.tv_sec : st->st_ctim.tv_sec;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (struct version){st->st_mtim, st->st_ctim, st->st_size, newest < now.tv_sec - COARSE_SECONDS};
}

static bool same(struct timespec one, struct timespec other)
{
    return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

bool version_equals(const struct version *one, const struct version *other)
{
    return one->known && other->known && same(one->mtime, other->mtime) && same(one->ctime, other->ctime)
        && one->size == other->size;
}
