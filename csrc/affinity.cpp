#include "affinity.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <new>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace moert {
namespace {

constexpr int kMaxCpus = 1 << 16;

std::string read_file(const std::string& path) {
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> pieces;
    std::istringstream stream(text);
    for (std::string piece; std::getline(stream, piece, separator);) pieces.push_back(piece);
    return pieces;
}

bool contains(const std::vector<std::string>& names, const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// False unless `text` is digits and nothing else.
bool parse_number(const std::string& text, int64_t limit, int64_t* value) {
    if (text.empty() || text.size() > 18) return false;
    int64_t number = 0;
    for (char c : text) {
        if (c < '0' || c > '9') return false;
        number = number * 10 + (c - '0');
    }
    *value = number;
    return number <= limit;
}

int count_cores(const std::string& root, const std::vector<int>& cpus) {
    std::set<int> cores;
    for (int cpu : cpus) {
        const std::string topology = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
        // The first name is the older one, which newer kernels keep but call deprecated.
        std::vector<int> siblings = parse_cpu_list(read_file(topology + "core_cpus_list"));
        if (siblings.empty()) siblings = parse_cpu_list(read_file(topology + "thread_siblings_list"));
        cores.insert(siblings.empty() ? cpu : siblings.front());
    }
    return static_cast<int>(cores.size());
}

std::vector<NumaNode> find_nodes(const std::string& root, const std::vector<int>& cpus) {
    const std::string folder = root + "/sys/devices/system/node/";
    std::vector<NumaNode> nodes;
    size_t covered = 0;
    for (int number : parse_cpu_list(read_file(folder + "online"))) {
        const std::vector<int> all = parse_cpu_list(read_file(folder + "node" + std::to_string(number) + "/cpulist"));
        NumaNode node;
        std::set_intersection(all.begin(), all.end(), cpus.begin(), cpus.end(), std::back_inserter(node.cpus));
        if (node.cpus.empty()) continue;
        node.physical_cores = count_cores(root, node.cpus);
        covered += node.cpus.size();
        nodes.push_back(std::move(node));
    }
    if (covered != cpus.size()) return {NumaNode{cpus, count_cores(root, cpus)}};
    return nodes;
}

struct CgroupMount {
    bool v2;
    std::string mounted;  // path within the hierarchy: "/", or the container's own group
    std::string at;
};

// Spaces and the like stand as \040 in mountinfo.
std::string unescape(const std::string& field) {
    std::string plain;
    for (size_t i = 0; i < field.size(); i++) {
        const bool escaped = field[i] == '\\' && i + 3 < field.size() &&
                             std::all_of(&field[i + 1], &field[i + 4], [](char c) { return c >= '0' && c <= '7'; });
        if (escaped) {
            plain += static_cast<char>((field[i + 1] - '0') * 64 + (field[i + 2] - '0') * 8 + (field[i + 3] - '0'));
            i += 3;
        } else {
            plain += field[i];
        }
    }
    return plain;
}

std::vector<CgroupMount> cgroup_mounts(const std::string& root) {
    std::vector<CgroupMount> mounts;
    for (const std::string& line : split(read_file(root + "/proc/self/mountinfo"), '\n')) {
        // 36 35 98:0 /mounted/path /mount/point rw,noatime master:1 - cgroup cgroup rw,cpu
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        const std::vector<std::string> left = split(line.substr(0, dash), ' '),
                                       right = split(line.substr(dash + 3), ' ');
        if (left.size() < 5 || right.size() < 3) continue;
        const bool v2 = right[0] == "cgroup2";
        if (!v2 && !(right[0] == "cgroup" && contains(split(right[2], ','), "cpu"))) continue;
        mounts.push_back({v2, unescape(left[3]), root + unescape(left[4])});
    }
    return mounts;
}

// The folders of the group `path` and of all its ancestors that the mount shows, innermost first.
std::vector<std::string> folders_up_from(const CgroupMount& mount, const std::string& path) {
    const std::string mounted = mount.mounted == "/" ? "" : mount.mounted;
    const bool inside =
        path.compare(0, mounted.size(), mounted) == 0 && (path.size() == mounted.size() || path[mounted.size()] == '/');
    std::vector<std::string> folders{mount.at};
    // A path from another cgroup namespace cannot be found here; the mount point is then the nearest known ancestor.
    if (inside && path.find("/..") == std::string::npos) {
        for (const std::string& part : split(path.substr(mounted.size()), '/')) {
            if (!part.empty()) folders.push_back(folders.back() + "/" + part);
        }
    }
    std::reverse(folders.begin(), folders.end());
    return folders;
}

void apply_quota(const std::string& source, const std::string& quota_text, const std::string& period_text,
                 CpuLimits* limits) {
    // "max" in v2 and -1 in v1 are no numbers here and mean no quota.
    int64_t quota, period;
    constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
    if (!parse_number(quota_text, kAny, &quota) || !parse_number(period_text, kAny, &period) || period == 0) return;
    const double cpus = static_cast<double>(quota) / static_cast<double>(period);
    if (cpus < limits->quota_cpus) {
        limits->quota_cpus = cpus;
        limits->quota_source = source;
    }
}

std::string first_line(const std::string& text) {
    return text.substr(0, text.find('\n'));
}

void find_quota(const std::string& root, CpuLimits* limits) {
    limits->quota_cpus = std::numeric_limits<double>::infinity();
    const std::vector<CgroupMount> mounts = cgroup_mounts(root);
    for (const std::string& line : split(read_file(root + "/proc/self/cgroup"), '\n')) {
        // 4:cpu,cpuacct:/user/job, and 0::/user/job for v2; a path may hold colons.
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        const bool v2 = controllers.empty();
        if (!v2 && !contains(split(controllers, ','), "cpu")) continue;
        for (const CgroupMount& mount : mounts) {
            if (mount.v2 != v2) continue;
            for (const std::string& folder : folders_up_from(mount, path)) {
                if (v2) {
                    const std::string source = folder + "/cpu.max";
                    const std::vector<std::string> fields = split(first_line(read_file(source)), ' ');
                    if (fields.size() == 2) apply_quota(source, fields[0], fields[1], limits);
                } else {
                    const std::string source = folder + "/cpu.cfs_quota_us";
                    apply_quota(source, first_line(read_file(source)),
                                first_line(read_file(folder + "/cpu.cfs_period_us")), limits);
                }
            }
        }
    }
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
    std::vector<int> cpus;
    for (const std::string& range : split(first_line(text), ',')) {
        const size_t dash = range.find('-');
        int64_t begin, end;
        if (!parse_number(range.substr(0, dash), kMaxCpus, &begin)) return {};
        end = begin;
        if (dash != std::string::npos && !parse_number(range.substr(dash + 1), kMaxCpus, &end)) return {};
        for (int64_t cpu = begin; cpu <= end; cpu++) cpus.push_back(static_cast<int>(cpu));
    }
    std::sort(cpus.begin(), cpus.end());
    cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
    return cpus;
}

std::vector<int> allowed_cpus() {
    // The kernel says EINVAL while the mask is smaller than the one it keeps, which may be for more CPUs than exist.
    for (int count = 1024; count <= kMaxCpus; count *= 2) {
        cpu_set_t* mask = CPU_ALLOC(count);
        if (mask == nullptr) throw std::bad_alloc();
        const size_t nbytes = CPU_ALLOC_SIZE(count);
        std::vector<int> cpus;
        const int failure = sched_getaffinity(0, nbytes, mask) == 0 ? 0 : errno;
        for (int cpu = 0; failure == 0 && cpu < count; cpu++) {
            if (CPU_ISSET_S(cpu, nbytes, mask)) cpus.push_back(cpu);
        }
        CPU_FREE(mask);
        if (failure == 0) return cpus;
        if (failure != EINVAL) throw std::runtime_error(std::string("sched_getaffinity: ") + std::strerror(failure));
    }
    throw std::runtime_error("sched_getaffinity: more than " + std::to_string(kMaxCpus) + " CPUs");
}

CpuLimits cpu_limits(const std::string& root, std::vector<int> cpus) {
    const std::string base = root == "/" ? "" : root;
    CpuLimits limits;
    std::sort(cpus.begin(), cpus.end());
    limits.cpus = std::move(cpus);
    limits.physical_cores = count_cores(base, limits.cpus);
    limits.nodes = find_nodes(base, limits.cpus);
    find_quota(base, &limits);
    return limits;
}

int default_threads(const CpuLimits& limits, std::string* why) {
    const double quota_threads = std::max(1.0, std::ceil(limits.quota_cpus));
    if (quota_threads < limits.physical_cores) {
        char cpus[32];
        std::snprintf(cpus, sizeof cpus, "%.4g", limits.quota_cpus);
        *why = std::string("a quota of ") + cpus + " CPUs in " + limits.quota_source;
        return static_cast<int>(quota_threads);
    }
    *why = std::to_string(limits.physical_cores) + " physical cores behind the " + std::to_string(limits.cpus.size()) +
           " CPUs that this process may run on";
    return std::max(1, limits.physical_cores);
}

std::vector<int> spread_over_nodes(const std::vector<NumaNode>& nodes, int count) {
    std::vector<int> given(nodes.size()), order;
    for (int thread = 0; thread < count; thread++) {
        size_t best = 0;
        for (size_t i = 1; i < nodes.size(); i++) {
            // cores[i] / (given[i] + 1) > cores[best] / (given[best] + 1)
            if (int64_t{nodes[i].physical_cores} * (given[best] + 1) >
                int64_t{nodes[best].physical_cores} * (given[i] + 1)) {
                best = i;
            }
        }
        given[best]++;
        order.push_back(static_cast<int>(best));
    }
    return order;
}

bool bind_thread(const std::vector<int>& cpus) {
    if (cpus.empty()) return false;
    const int count = *std::max_element(cpus.begin(), cpus.end()) + 1;
    cpu_set_t* mask = CPU_ALLOC(count);
    if (mask == nullptr) return false;
    const size_t nbytes = CPU_ALLOC_SIZE(count);
    CPU_ZERO_S(nbytes, mask);
    for (int cpu : cpus) CPU_SET_S(cpu, nbytes, mask);
    const bool bound = sched_setaffinity(0, nbytes, mask) == 0;
    CPU_FREE(mask);
    return bound;
}

}  // namespace moert
