/* File handles: by which a file can be opened again, and told from others that have its number. For any thread. */
#ifndef READER_HANDLE_H
#define READER_HANDLE_H

#include <stdbool.h>
#include <stdint.h>

/* Type and opaque bytes, as `syscalls.file_handle` has it. */
struct handle {
    uint32_t length;
    uint8_t bytes[];
};

/* To be freed; NULL: there is none, or no memory. `to_tell`: one will do that only tells files apart (Linux 6.5). */
struct handle *handle_at(int fd, bool to_tell);
bool handle_equals(const struct handle *one, const struct handle *other); /* NULL: no */
/* An O_PATH descriptor on the file system of `mount`; -1: errno. */
int handle_open(int mount, const struct handle *h);

#endif
