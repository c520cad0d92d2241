#include "reader_handle.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define HANDLE_FID 0x200 /* AT_HANDLE_FID */
#define HEAD offsetof(struct file_handle, handle_type) /* bytes in front of what a handle is here */

union room {
    struct file_handle head;
    uint8_t bytes[sizeof(struct file_handle) + MAX_HANDLE_SZ];
};

struct handle *handle_at(int fd, bool to_tell)
{
    union room room = {.head.handle_bytes = MAX_HANDLE_SZ};
    int mount_id;
    int rc = name_to_handle_at(fd, "", &room.head, &mount_id, AT_EMPTY_PATH);
    if (rc && to_tell) {
        room.head.handle_bytes = MAX_HANDLE_SZ;
        rc = name_to_handle_at(fd, "", &room.head, &mount_id, AT_EMPTY_PATH | HANDLE_FID);
    }
    if (rc)
        return NULL;
    uint32_t length = room.head.handle_bytes + (uint32_t)(sizeof(struct file_handle) - HEAD);
    struct handle *h = malloc(sizeof *h + length);
    if (!h)
        return NULL;
    h->length = length;
    memcpy(h->bytes, room.bytes + HEAD, length);
    return h;
}

bool handle_equals(const struct handle *one, const struct handle *other)
{
    return one && other && one->length == other->length && !memcmp(one->bytes, other->bytes, one->length);
}

int handle_open(int mount, const struct handle *h)
{
    union room room;
    int fd;
    if (h->length > sizeof room - HEAD) {
        errno = ESTALE;
        return -1;
    }
    room.head.handle_bytes = h->length - (uint32_t)(sizeof(struct file_handle) - HEAD);
    memcpy(room.bytes + HEAD, h->bytes, h->length);
    do
        fd = open_by_handle_at(mount, &room.head, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    return fd;
}
