/* What a directory says of itself: its names, as it has them at one time, and which version of it that is.
 *
 * Threading: plain values; whoever has one reads or frees it. */
#ifndef READER_NAMES_H
#define READER_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

struct name {
    const char *bytes; /* ends with a zero */
    size_t length;
    uint64_t number; /* of the file, as the directory says; 0: unknown */
    uint64_t after;  /* where what comes then begins, as the directory says; 0: unknown */
    uint32_t type;   /* DT_* */
};

/* "." or "..": the kernel counts no lookups of these. */
static inline bool name_is_dots(const char *bytes, size_t length)
{
    return length && length <= 2 && bytes[0] == '.' && bytes[length - 1] == '.';
}

/* What a change of a directory's names cannot leave as it was, if it is settled. */
struct version {
    struct timespec mtime, ctime;
    int64_t size;
    bool known; /* false: there is none */
};

struct names {
    struct name *all;     /* "." and ".." first, unless nothing can be said, or it is a rest */
    size_t count, room;
    struct piece *pieces; /* which have the bytes */
    uint64_t from;        /* it is what the directory has from there on; 0: all */
    int error;            /* errno that ended it early; 0 */
    struct version after; /* of the directory, once they were read */
};

/* Read the directory open at `fd`: all of it, or what comes `from` a place after one of its names. `again`: it was read before.
 * NULL: no memory. */
struct names *names_read(int fd, bool again, uint64_t from);
/* Of names that are known; the bytes are copied. NULL: no memory. */
struct names *names_of(const char *const *names, size_t count);
void names_free(struct names *c); /* may be NULL */

/* Of what stat says, if every later change will show in it: directories have coarse stamps on some file systems whose
 * files have fine ones (tmpfs), so one that was changed within the last two seconds has none. */
struct version version_settled(const struct stat *st);
bool version_equals(const struct version *one, const struct version *other); /* none is equal to none */

#endif
